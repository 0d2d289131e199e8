"""Other programs open an export as it is, and compute the same with it."""

import gc
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import regex
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, pipeline

from mtp_dist.convert.from_huggingface import import_model
from mtp_dist.convert.import_config import ImportRequest
from mtp_dist.convert.to_huggingface import export_checkpoint
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.data.tokenizer import Tokenizer as TrainingTokenizer
from mtp_dist.model.reference import ReferenceModel
from tests.unit.convert.folders import (
    TEXT,
    VOCAB_SIZE,
    byte_pairs,
    open_model,
    train_sentencepiece,
    write_architecture,
    write_llama,
    write_model,
)

PROMPT, CONTINUATION = "def f(x):", " return x"
IMPORTED = {"Qwen2": {"tie_word_embeddings": True}, "Qwen3": {}, "GPTNeoX": {}, "Mistral": {"sliding_window": 64}}
"""Options in config.json by architecture."""
KINDS = ("byte pairs", "bytes", "SentencePiece", "imported Llama", *(f"imported {name}" for name in IMPORTED))


@dataclass(frozen=True)
class Export:
    folder: Path
    model: ReferenceModel
    tokenizer: TrainingTokenizer

    def logits(self, text: str) -> torch.Tensor:
        return self.next_token_logits(self.tokenizer.encode(text).tolist())

    def next_token_logits(self, tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.model.next_token_logits(torch.tensor([tokens]))[0]


def llama_with_bos(folder: Path) -> None:
    """Write a Llama whose tokenizer begins each text with a BOS."""
    library = Tokenizer.from_file(str(byte_pairs(folder)))
    library.add_special_tokens(["<s>"])
    special = [("<s>", library.token_to_id("<s>"))]
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=special)
    library.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    write_llama(folder, None, vocab_size=library.get_vocab_size(), tie_word_embeddings=True)


every_export = pytest.mark.parametrize("export", KINDS, indirect=True, scope="module")


@pytest.fixture(scope="module")
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Export:
    folder = tmp_path_factory.mktemp("export")
    kind = request.param
    if kind.startswith("imported"):
        name = kind.removeprefix("imported ")
        if name == "Llama":
            llama_with_bos(folder / "source")
        else:
            write_architecture(folder / "source", f"{name}ForCausalLM", **IMPORTED[name])
        import_model(ImportRequest(folder / "source", folder / "c"))
        model, name = open_model(folder / "c"), str(folder / "c")
    else:
        options = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
        trained = {"byte pairs": byte_pairs, "SentencePiece": partial(train_sentencepiece, vocab_size=330, **options)}
        name = str(trained[kind](folder)) if kind in trained else kind
        sections = {"data": {"tokenizer": name}, "train": {"sequence_length": 128}}
        model = write_model(folder / "c", build_tokenizer(name).vocab_size, **sections)
    export_checkpoint(folder / "c", folder / "hf", "fp32")
    return Export(folder / "hf", model, build_tokenizer(name))


@every_export
def test_pipeline_continues_a_text(export: Export) -> None:
    generate = pipeline("text-generation", model=str(export.folder), device="cpu")
    written = generate(PROMPT, max_new_tokens=5, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    ids = export.tokenizer.encode(PROMPT).tolist()
    for _ in range(len(written) - len(ids)):
        ids.append(int(export.next_token_logits(ids)[-1].argmax()))
    assert written == ids


@every_export
def test_texts_of_several_lengths_form_a_batch(export: Export) -> None:
    tokenizer = AutoTokenizer.from_pretrained(export.folder)
    llama = AutoModelForCausalLM.from_pretrained(export.folder)
    batch = tokenizer([PROMPT, TEXT], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(llama(**batch).logits[0, -1], export.logits(PROMPT)[-1], rtol=1e-4, atol=1e-4)
    collated = DataCollatorForLanguageModeling(tokenizer, mlm=False)([tokenizer(PROMPT), tokenizer(TEXT)])
    assert collated["labels"].shape == batch["input_ids"].shape
    end = export.tokenizer.end_of_document
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (end, end)


@every_export
def test_lm_eval_scores_a_text(export: Export) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    scorer = HFLM(pretrained=str(export.folder), device="cpu", batch_size=2, dtype="float32")
    pairs = [(PROMPT, CONTINUATION), ("", PROMPT)]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    scores = [score for score, _ in scorer.loglikelihood(requests, disable_tqdm=True)]

    def expected(before: list[int], text: list[int]) -> float:
        log_probabilities = export.next_token_logits(before + text).log_softmax(-1)
        return sum(float(log_probabilities[len(before) - 1 + index, token]) for index, token in enumerate(text))

    full, prompt = (export.tokenizer.encode(text).tolist() for text in (PROMPT + CONTINUATION, PROMPT))
    wanted = [expected(prompt, full[len(prompt) :]), expected([export.tokenizer.end_of_document], prompt)]
    assert scores == pytest.approx(wanted, rel=1e-4), "an empty context is the start of a document"


# CTranslate2 reads a key of GPT-NeoX that transformers 5 has no longer, and no text longer than a window at once.
@pytest.mark.parametrize(
    "export", [kind for kind in KINDS if kind != "imported GPTNeoX"], indirect=True, scope="module"
)
def test_ctranslate2_computes_the_same(export: Export, tmp_path: Path) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")
    gc.freeze()  # the converter collects garbage after each layer, which takes seconds with all that tests import
    converted = ctranslate2.converters.TransformersConverter(str(export.folder)).convert(str(tmp_path / "ct2"))
    gc.unfreeze()
    generator = ctranslate2.Generator(converted, device="cpu", inter_threads=1, intra_threads=1)
    tokens = AutoTokenizer.from_pretrained(export.folder).convert_ids_to_tokens(export.tokenizer.encode(TEXT).tolist())
    logits = torch.from_numpy(np.array(generator.forward_batch([tokens])))[0]
    torch.testing.assert_close(logits, export.logits(TEXT), rtol=1e-4, atol=1e-4)


@every_export
def test_peft_trains_an_adapter(export: Export) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    llama = AutoModelForCausalLM.from_pretrained(export.folder)
    matrix = "query_key_value" if llama.config.model_type == "gpt_neox" else "q_proj"
    adapted = peft.get_peft_model(llama, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=[matrix]))
    ids = torch.tensor([export.tokenizer.encode(TEXT).tolist()])
    output = adapted(ids, labels=ids)
    torch.testing.assert_close(output.logits[0].detach(), export.logits(TEXT), rtol=1e-4, atol=1e-4)
    output.loss.backward()
    assert all(weight.grad is not None for weight in adapted.parameters() if weight.requires_grad)


@every_export
def test_llama_cpp_reads_vocabulary_and_weights(export: Export, tmp_path: Path) -> None:
    """Write as GGUF what llama.cpp's converter takes from a folder, with its own classes, and read it again."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    tokenizer = AutoTokenizer.from_pretrained(export.folder)
    special = gguf.SpecialVocab(export.folder, load_merges=True, n_vocab=len(tokenizer))
    if (export.folder / "tokenizer.model").exists():  # the converter takes it before tokenizer.json
        vocabulary = [text.decode() for text, _, _ in gguf.vocab.SentencePieceVocab(export.folder).all_tokens()]
    else:
        vocabulary = [tokenizer.convert_ids_to_tokens(token) for token in range(len(tokenizer))]
    llama = AutoModelForCausalLM.from_pretrained(export.folder)
    architectures = {
        "qwen2": gguf.MODEL_ARCH.QWEN2,
        "qwen3": gguf.MODEL_ARCH.QWEN3,
        "gpt_neox": gguf.MODEL_ARCH.GPTNEOX,
    }
    architecture = architectures.get(llama.config.model_type, gguf.MODEL_ARCH.LLAMA)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_token_list(vocabulary)
    special.add_to_gguf(writer, quiet=True)
    names = gguf.get_tensor_name_map(architecture, llama.config.num_hidden_layers)
    kinds = (".weight", ".bias")
    weights = {names.get_name(name, kinds): weight.numpy(force=True) for name, weight in llama.named_parameters()}
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {tensor.name for tensor in reader.tensors} == weights.keys()
    assert all((tensor.data == weights[tensor.name]).all() for tensor in reader.tensors)
    read = {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in reader.fields.items()}
    assert read["tokens"] == vocabulary and len(vocabulary) == export.tokenizer.vocab_size
    end = export.tokenizer.end_of_document
    assert (read["bos_token_id"], read["eos_token_id"], read["padding_token_id"]) == (end, end, end)
    assert (read["add_bos_token"], read["add_eos_token"]) == (False, False)
    # llama.cpp opens no vocabulary of byte pairs without merges, so it cannot use an export with bytes alone.
    assert ("merges" in read) == (export.tokenizer.vocab_size > VOCAB_SIZE)


@every_export
def test_import_has_the_tokenizer_of_the_training(export: Export, tmp_path: Path) -> None:
    imported = import_model(ImportRequest(export.folder, tmp_path / "c")).config
    assert build_tokenizer(imported.data.tokenizer).fingerprint == export.tokenizer.fingerprint


def test_documented_tokenizers_split_as_gpt_2_does(tmp_path: Path) -> None:
    """llama.cpp implements this pre-tokenizer, by the name gpt-2."""
    gpt2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    splitter = Tokenizer.from_file(str(byte_pairs(tmp_path))).pre_tokenizer
    for text in (TEXT, "I've  12 dogs,\r\n\n they'll\tbark ... ", "日本 Übung x2"):
        parts = [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)]
        assert parts == gpt2.findall(text)
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    assert "pre_tokenizers.ByteLevel(add_prefix_space=False)" in page
