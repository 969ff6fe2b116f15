"""A server reads few numbers of tokens at once where kernels are kept for each number for good."""

import pytest
import torch
from tests.serve.parts import anchor_of, app_of, asked_of, direction_of
from tests.tiny import DEVICE, tiny_model

from demur.models import Model
from demur.models.decoding import buffers
from demur.serve.engine import _chunk
from demur.serve.layout import roomy, widened

half_on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="widths are rounded on CPUs alone")


@half_on_cpu
def test_widths_are_rounded_up_by_an_eighth_at_most_and_are_few():
    model = tiny_model(dtype=torch.bfloat16)
    found = [roomy(model, count) for count in range(1, 8193)]
    assert all(n <= wide <= max(n + 7, 1.125 * n) for n, wide in enumerate(found, 1))
    assert found == sorted(found)
    assert len(set(found)) < 70
    assert all(roomy(model, wide) == wide for wide in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_types_are_left_as_they_are(dtype):
    model = tiny_model(dtype=dtype)
    assert [roomy(model, count) for count in range(1, 200)] == list(range(1, 200))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3-moe"])
def test_padding_in_front_changes_no_state(name):
    model = tiny_model(name)
    batch = model.encode(["a tree in a garden", "stop it"])
    wide = widened(batch, 5, pad_id=model.pad_id)
    assert wide.spans.keys() == batch.spans.keys()
    plain = model.extend(batch.ids, batch.mask, _chunk(batch), buffers())
    padded = model.extend(wide.ids, wide.mask, _chunk(wide), buffers())[:, 5:]
    real = batch.mask.to(plain.device)
    torch.testing.assert_close(padded[real], plain[real], rtol=1e-10, atol=1e-10)


@half_on_cpu
@pytest.mark.parametrize("anchored", [False, True])
def test_prompts_of_all_lengths_are_read_at_few_widths(anchored, monkeypatch):
    widths = set()
    extend = Model.extend

    def seen(self, ids, *args, **options):
        widths.add(tuple(ids.shape))
        return extend(self, ids, *args, **options)

    model = tiny_model(dtype=torch.bfloat16)
    anchor = anchor_of(model, threshold=0.6) if anchored else None
    app = app_of(model, anchor=anchor, directions={"way": direction_of(model)})
    monkeypatch.setattr(Model, "extend", seen)
    with asked_of(app) as ask:
        for words in range(1, 33):
            text = " ".join(["tree"] * words)
            assert ask.chat(text, max_tokens=1).status_code == 200
            messages = [{"role": "user", "content": text}]
            body = {"direction": "way", "messages": messages, "reply": "a tree"}
            assert ask("POST", "/demur/trace", json=body).status_code == 200
    longest = max(width for _, width in widths)
    n_post = model.template.n_post
    assert longest > 32
    wide = {width for _, width in widths if width > n_post + 1}
    assert len(wide) <= longest / 8 + 1, sorted(widths)
