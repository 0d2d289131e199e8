"""A tokenizer that notes how long it takes. Apart, because the processes of `prepare` import it."""

from pathlib import Path
from time import perf_counter

from tokenizers import Encoding

from mtp_dist.data.text_tokenizers import HuggingFaceTokenizer


class TimedTokenizer(HuggingFaceTokenizer):
    notes: Path
    """A file that every process adds the seconds of each call of the library to."""

    def encode_texts(self, texts: list[str]) -> list[Encoding]:
        start = perf_counter()
        encodings = super().encode_texts(texts)
        with self.notes.open("a", encoding="utf-8") as file:
            file.write(f"{perf_counter() - start}\n")
        return encodings
