"""Converting a SentencePiece model to a tokenizer of Hugging Face's `tokenizers` that gives the same ids."""

import re
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPACE = "▁"
"""The character that SentencePiece writes for a space."""


def convert_sentencepiece(file: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the tokenizer and its keys of tokenizer_config.json."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())  # type: ignore[attr-defined] # made at import
    types = proto.SentencePiece.Type
    names = {kind: [p.piece for p in proto.pieces if p.type == kind] for kind in (types.CONTROL, types.USER_DEFINED)}
    library = Tokenizer(_model(proto))
    library.normalizer = _normalizer(proto.normalizer_spec)
    if symbols := sorted(names[types.USER_DEFINED], key=len, reverse=True):
        pattern = Regex("|".join(map(re.escape, symbols)))
        library.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    prefix = proto.normalizer_spec.add_dummy_prefix
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*parts, decoders.Strip(" ", left=1)] if prefix else parts)
    library.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names[types.CONTROL]])
    # llama.cpp reads tokenizer.model and add_prefix_space.
    settings = {"add_prefix_space": prefix, "unk_token": proto.trainer_spec.unk_piece}
    if proto.trainer_spec.pad_id >= 0:
        settings["pad_token"] = proto.trainer_spec.pad_piece
    return library, settings


def _model(proto: Any) -> models.Model:
    trainer, types = proto.trainer_spec, proto.SentencePiece.Type
    if trainer.model_type == trainer.UNIGRAM:
        pieces = [(piece.piece, piece.score) for piece in proto.pieces]
        return models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == types.NORMAL}
    # SentencePiece merges any two neighbours that form a piece, the highest score first.
    merges = [
        (piece[:end], piece[end:])
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for end in range(1, len(piece))
        if piece[:end] in scores and piece[end:] in scores
    ]
    return models.BPE(
        vocab={piece.piece: number for number, piece in enumerate(proto.pieces)},
        merges=merges,
        unk_token=trainer.unk_piece,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
        ignore_merges=any(piece.type == types.USER_DEFINED for piece in proto.pieces),  # these have none
    )


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        characters = normalizers.Precompiled(spec.precompiled_charsmap)
        # It normalizes \r\n as one character, SentencePiece as two.
        both = "".join(characters.normalize_str(character) for character in "\r\n")
        steps += [normalizers.Replace("\r\n", both), characters]
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" +"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)
