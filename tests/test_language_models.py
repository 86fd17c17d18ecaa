"""Text encoders, and an autoregressive stage with a KV cache, each with its component's options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import error
from zoo.weights import redraw

from omniq_compile import build_quant_config, quantize_

transformers = pytest.importorskip("transformers")

ROUTES = build_quant_config(
    {
        "text_encoder": {"method": "int8", "min_features": 16, "compiler": "eager"},
        "text_encoder_2": {"method": "fp8", "min_features": 16, "compiler": "eager"},
        "text_encoder_3": {"method": "mxfp8", "min_features": 16, "compiler": "eager"},
        "language_model": {"method": "int8", "min_features": 16, "compiler": "eager"},
        "vae": None,
    }
)
VOCABULARY = 24


def t5() -> Any:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=VOCABULARY, d_model=48, d_kv=16, d_ff=96, num_layers=2, num_heads=3
        )
    )


def clip() -> Any:
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=3, max_position_embeddings=16, eos_token_id=VOCABULARY - 1,
        )
    )  # fmt: skip


def qwen_vl() -> Any:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    return Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
            rope_scaling={"type": "default", "mrope_section": [2, 3, 3]},
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "component", "limit"),
    [(t5, "text_encoder", 0.05), (clip, "text_encoder_2", 0.12), (qwen_vl, "text_encoder_3", 0.12)],
)
@torch.no_grad()
def test_a_text_encoder_stays_near_bf16(make: Any, component: str, limit: float) -> None:
    encoder = make().eval().requires_grad_(False)
    # T5 does not divide by the square root of the head's width; its weights do.
    redraw(encoder, {".q": 0.25} if make is t5 else None)
    encoder.to(torch.bfloat16)
    ids = torch.randint(VOCABULARY - 1, (2, 9))
    ids[:, -1] = VOCABULARY - 1
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    expected = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    fast = torch.compile(encoder, backend="omniq", options=ROUTES.options_for(component))
    actual = fast(input_ids=ids, attention_mask=mask).last_hidden_state
    assert actual.dtype is expected.dtype
    assert 1e-3 < error(actual[mask.bool()], expected[mask.bool()]) < limit


def language_model() -> Any:
    """A small Qwen, trained in seconds to count on by 5 modulo the vocabulary, sure of itself."""
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=64,
        eos_token_id=None, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        start = torch.randint(VOCABULARY, (16, 1))
        ids = (start + 5 * torch.arange(12)) % VOCABULARY
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False).to(torch.bfloat16)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_language_model_says_the_same_tokens(cache: str) -> None:
    model = language_model()
    prompt = torch.tensor([[3, 8, 13], [20, 1, 6]])
    settings = {
        "max_new_tokens": 12, "do_sample": False, "cache_implementation": cache,
        "attention_mask": torch.ones_like(prompt), "disable_compile": True,
    }  # fmt: skip
    with torch.no_grad():
        expected = model.generate(prompt, **settings)
        # It is confident and right, so that equal tokens say something.
        assert torch.equal(expected, (prompt[:, :1] + 5 * torch.arange(15)) % VOCABULARY)
        options = ROUTES.options_for("language_model")
        assert options is not None
        plain = model.forward
        calls = []

        def watched(*args: Any, **kwargs: Any) -> Any:
            calls.append(kwargs["input_ids"].shape[1])
            return fast(*args, **kwargs)

        fast = torch.compile(plain, backend="omniq", options=options)
        model.forward = watched
        assert torch.equal(model.generate(prompt, **settings), expected)
        assert calls == [3, *[1] * 11]  # the cache was used
        logits = fast(input_ids=prompt).logits
        assert 1e-3 < error(logits, plain(input_ids=prompt).logits) < 0.05


def test_a_language_model_that_stores_its_codes_says_the_same_tokens() -> None:
    model = language_model()
    prompt = torch.tensor([[3, 8, 13]])
    settings = {"max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        expected = model.generate(prompt, **settings)
        quantize_(model, ROUTES.options_for("language_model") or {})
        assert torch.equal(model.generate(prompt, **settings), expected)
        model.forward = torch.compile(
            model.forward, backend="omniq", options=ROUTES.options_for("language_model")
        )
        assert torch.equal(model.generate(prompt, **settings), expected)
