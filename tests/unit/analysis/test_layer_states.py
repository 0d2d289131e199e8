"""States of layers compared with those that transformers returns."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from mtp_dist.analysis.causal_model import CausalModel
from mtp_dist.analysis.probe import read_states
from mtp_dist.analysis.text import read_tokens
from mtp_dist.analysis.trained_model import TrainedModel
from mtp_dist.convert.to_huggingface import export_checkpoint
from mtp_dist.errors import CheckpointError
from tests.unit.analysis.test_marginalization import open_network, random_text
from tests.unit.convert.folders import write_model


def read(model, text, limit):
    progress = []
    found = read_states(model, model.windows(text, limit), lambda *numbers: progress.append(numbers))
    assert progress[-1] == (len(progress), len(progress))
    return found


@pytest.mark.parametrize("kind", ["parallel", "anticausal", "mlp"])
def test_states_of_an_export_are_those_of_transformers(tmp_path, monkeypatch, kind):
    """Of a checkpoint and of the Llama in its export, in several batches."""
    monkeypatch.setattr("mtp_dist.analysis.trained_model.TOKENS_PER_BATCH", 32)
    monkeypatch.setattr("mtp_dist.analysis.causal_model.TOKENS_PER_BATCH", 32)
    write_model(tmp_path / "checkpoint", heads={"kind": kind})
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "export", "fp32")
    (tmp_path / "text.txt").write_text("one two three four five six\n" * 5)
    trained = TrainedModel.open(tmp_path / "checkpoint")
    tokens = read_tokens(str(tmp_path / "text.txt"), trained, 84)
    found = read(trained, tokens, 80)
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    windows = torch.tensor(tokens[:81].astype("int64")).unfold(0, 17, 16)
    with torch.no_grad():
        output = llama(windows[:, :-1], output_hidden_states=True)
    expected = torch.stack([state.flatten(0, 1) for state in output.hidden_states])
    assert found.layers == ["embedding", *(f"layer {index}" for index in range(1, 5)), "final norm"]
    before_head = 4 if kind == "mlp" else 5  # transformers returns the last layer's output after the norm only
    torch.testing.assert_close(found.states[:before_head], expected[:before_head], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.states[-1], expected[-1], rtol=1e-5, atol=1e-5)
    losses = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(found.own_losses[0], losses.double(), rtol=1e-5, atol=1e-5)

    foreign = CausalModel.open(tmp_path / "export")
    foreign = CausalModel(foreign.folder, foreign.network, foreign.tokenizer, 16)
    found = read(foreign, tokens, 80)
    torch.testing.assert_close(found.states, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.own_losses, losses[None].double(), rtol=1e-5, atol=1e-5)


def test_token_in_front_of_each_window_has_no_state():
    network = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=16, n_layer=2, n_head=4))
    model, text = open_network(network, start=(7,)), random_text(49)
    found = read(model, text.numpy(), 48)
    rows = torch.cat([torch.full((2, 1), 7), text[:48].view(2, 24)], 1)
    with torch.no_grad():
        output = model.network(rows, output_hidden_states=True)
    expected = torch.stack([state[:, 1:].flatten(0, 1) for state in output.hidden_states])
    torch.testing.assert_close(found.states, expected)
    assert found.layers == ["embedding", "layer 1", "final norm"] and (model.num_layers, model.output_layer) == (
        2,
        "final norm",
    )
    log_probs = output.logits[:, 1:].log_softmax(-1).flatten(0, 1)
    torch.testing.assert_close(found.own_losses[0], -log_probs.gather(1, text[1:, None])[:, 0].double())


def test_models_without_comparable_states_are_refused():
    config = OPTConfig(vocab_size=9, hidden_size=16, num_hidden_layers=2, ffn_dim=16, num_attention_heads=4)
    config.word_embed_proj_dim = 8
    model = open_network(OPTForCausalLM(config))
    with pytest.raises(CheckpointError, match="does not return the hidden states of its layers"):
        read(model, random_text(49).numpy(), 48)
