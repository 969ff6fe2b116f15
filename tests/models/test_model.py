import pytest
import torch
from scipy import stats
from tiny import TEMPLATES, TINY_CONFIGS, VOCAB, tiny_hf, tiny_model

from demur.directions import Direction
from demur.errors import ConfigError, FamilyError, NonFiniteError, TemplateError
from demur.interventions import Add, applied
from demur.models import Model, TokenBatch, Turn, family_of
from demur.models.decoding import Sampling
from demur.sites import Site, Span

every_family = pytest.mark.parametrize("name", TINY_CONFIGS)
PROMPTS = ["a tree", "How do I plant a tree in a small garden?", "Where is the station"]
TALK = tuple(
    Turn(role, text)
    for role, text in [
        ("user", "Name a tree."),
        ("assistant", "The oak"),
        ("user", "Where is the station"),
        ("assistant", "It is far from here"),
        ("user", "a tree"),
    ]
)
KINDS = ("resid_pre", "attn_out", "mlp_out", "resid_post")


def record(model, site, into):
    return model.intercept(site, lambda x: into.append(x) or x)


# Passes ----------------------------------------------------------------------------------------


@every_family
def test_logits_do_not_depend_on_padding_batch_or_prefix(name):
    model = tiny_model(name)
    batch = model.encode(PROMPTS)
    assert batch.shared > 5  # Longer than the sliding windows of the tiny models.
    logits = model.logits(batch)
    close = {"rtol": 1e-6, "atol": 1e-6}  # Norms and softmax run in float32 at most.
    for i, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(logits[i : i + 1], model.logits(model.encode([prompt])), **close)
    torch.testing.assert_close(logits, model.logits(batch.left_padded()), **close)
    with model.whole_rows():
        torch.testing.assert_close(logits, model.logits(batch), **close)
    for i, row in enumerate(batch.ids):
        with torch.no_grad():
            theirs = model.hf(input_ids=row[batch.mask[i]].unsqueeze(0)).logits[0, -1]
        torch.testing.assert_close(logits[i], theirs, **close)


@every_family
def test_padding_ids_do_not_matter(name):
    model = tiny_model(name)
    batch = model.encode(PROMPTS)
    logits = model.logits(batch)
    other = TokenBatch(batch.ids.masked_fill(~batch.mask, 7), batch.mask, batch.spans, batch.shared)
    torch.testing.assert_close(model.logits(other), logits, rtol=1e-6, atol=1e-6)


@every_family
def test_edits_reach_a_shared_prefix_as_they_reach_whole_rows(name):
    model = tiny_model(name)
    batch = model.encode(PROMPTS)
    for site in (Site(0, "resid_pre"), Site(1, "attn_out"), Site(1, "mlp_out")):
        undo = model.intercept(site, lambda x: 1.5 * x + 0.1 * x.roll(1, -1))
        apart = model.logits(batch)
        with model.whole_rows():
            torch.testing.assert_close(apart, model.logits(batch), rtol=1e-6, atol=1e-6)
        undo()
        assert (apart - model.logits(batch)).abs().max() > 1e-3


@every_family
@pytest.mark.parametrize("kind", KINDS)
def test_a_remembered_pass_goes_on_from_the_first_edit(name, kind):
    model = tiny_model(name)
    for batch in (model.encode(PROMPTS), model.encode(PROMPTS[1:2])):  # With and without a prefix.
        memory = model.remember(batch)
        for layer in (1, 2):
            undo = model.intercept(Site(layer, kind), lambda x: 1.5 * x + 0.1 * x.roll(1, -1))
            whole, resumed = model.logits(batch), model.logits(batch, memory)
            undo()
            torch.testing.assert_close(resumed, whole, rtol=1e-9, atol=1e-9)
            assert (whole - model.logits(batch)).abs().max() > 1e-3


def states_in_spans(model, batch):
    """What leaves the last block at the tokens of each span, by span and row."""
    found = {}

    def keep(x):
        chunk = model.chunk
        if not chunk.is_prefix:
            for i, row in enumerate(chunk.rows.tolist()):
                found.update({(span, row): x[i][mask[i]] for span, mask in chunk.spans.items()})
        return x

    undo = model.intercept(Site(model.n_layers - 1, "resid_post"), keep)
    model.read(batch)
    undo()
    return found


@every_family
def test_a_conversation_reads_in_a_batch_as_it_reads_alone(name):
    model = tiny_model(name)
    prompts = [PROMPTS[0], TALK, PROMPTS[1], TALK[:3]]
    batch = model.encode(prompts)
    assert batch.shared > 5
    ways = [states_in_spans(model, batch), states_in_spans(model, batch.left_padded())]
    with model.whole_rows():
        ways.append(states_in_spans(model, batch))
    ways.append(
        states_in_spans(model, batch.rows([3, 0])) | states_in_spans(model, batch.rows([2, 1]))
    )
    spans = (Span.EARLIER, Span.INSTRUCTION, Span.POST_INSTRUCTION)
    for i, prompt in enumerate(prompts):
        alone = states_in_spans(model, model.encode([prompt]))
        assert (len(alone[Span.EARLIER, 0]) > 0) == (not isinstance(prompt, str))
        for span in spans:
            for found in ways:
                torch.testing.assert_close(found[span, i], alone[span, 0], rtol=1e-6, atol=1e-6)
    # The same words with nothing in front of them are read otherwise.
    first, last = (ways[0][Span.INSTRUCTION, i] for i in (0, 1))
    assert TALK[-1].text == PROMPTS[0]
    assert first.shape == last.shape
    assert (first - last).abs().max() > 1e-2


def test_a_conversation_is_answered_as_it_is_alone():
    model = tiny_model("llama")
    replies = model.generate(model.encode([TALK, PROMPTS[0], TALK[:3]]), max_new_tokens=5)
    for prompt, reply in zip([TALK, PROMPTS[0], TALK[:3]], replies, strict=True):
        assert list(reply.ids) == by_argmax(model, model.encode([prompt]).ids, 5)


def test_blocks_before_the_first_edit_are_not_computed_again():
    model = tiny_model("llama")
    batch = model.encode(PROMPTS)
    memory = model.remember(batch)
    ran = []
    for i, block in enumerate(model.blocks):
        block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
    undo = model.intercept(Site(2, "resid_pre"), lambda x: 2 * x)
    model.logits(batch, memory)
    assert ran == [2, 2]  # The shared prefix, and the rest.
    undo()
    # Edits of the first block leave nothing to skip, and no edit leaves the plain pass.
    ran.clear()
    plain = model.logits(batch, memory)
    assert ran == [0, 1, 2, 0, 1, 2]
    undo = model.intercept(Site(0, "resid_pre"), lambda x: 2 * x)
    edited = model.logits(batch, memory)
    undo()
    assert (edited - plain).abs().max() > 1e-3


def test_nothing_is_remembered_of_an_edited_model():
    model = tiny_model("llama")
    undo = model.intercept(Site(1, "resid_pre"), lambda x: 2 * x)
    with pytest.raises(FamilyError, match=r"being edited at 1\.resid_pre"):
        model.remember(model.encode(PROMPTS))
    undo()


@every_family
def test_a_kept_prefix_is_computed_anew_when_edits_change(name):
    model = tiny_model(name)
    batch = model.encode(PROMPTS)
    plain = model.logits(batch)
    with model.prefix_kept():
        before = model.runs
        first, again = model.logits(batch), model.logits(batch)
        assert model.runs == before + 3  # One prefix, two batches.
        undo = model.intercept(Site(1, "mlp_out"), lambda x: 1.5 * x)
        edited = model.logits(batch)
        undo()
        back = model.logits(batch)
    for logits in (first, again, back):
        torch.testing.assert_close(logits, plain, rtol=0, atol=0)
    undo = model.intercept(Site(1, "mlp_out"), lambda x: 1.5 * x)
    torch.testing.assert_close(edited, model.logits(batch), rtol=0, atol=0)
    undo()


@every_family
def test_reading_stops_behind_the_last_site_that_is_read(name):
    model = tiny_model(name)
    batch = model.encode(PROMPTS)
    for kind, blocks in (("resid_pre", 1), ("attn_out", 2), ("resid_post", 2)):
        short, whole, ran = [], [], []
        site = Site(1, kind)
        watch = [
            block.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
            for block in model.blocks
        ]
        undo = record(model, site, short)
        with model.prefix_kept():
            model.read(batch)
            model.read(batch)
        undo()
        # A pre-hook that was set before the stop still runs on the block that is not computed.
        assert len(ran) <= 3 * (blocks + 1)
        for handle in watch:
            handle.remove()
        undo = record(model, site, whole)
        model.final_states(batch)
        undo()
        assert model.chunk is None
        torch.testing.assert_close(short[1], whole[1], rtol=0, atol=0)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_head_is_given_rows_that_lie_together(frozen):
    # A slice of the states times frozen weights copies the vocabulary matrix once a row, which made
    # a step of a batch of 32 take nine seconds in place of ten milliseconds.
    model = tiny_model("llama")
    for parameter in model.hf.parameters():
        parameter.requires_grad_(not frozen)
    shapes = []
    head = model.hf.get_output_embeddings()
    watch = head.register_forward_pre_hook(
        lambda _module, args: shapes.append((args[0].dim(), args[0].is_contiguous()))
    )
    model.logits(model.encode(PROMPTS))
    model.generate(PROMPTS, max_new_tokens=3, batch_size=2)
    watch.remove()
    assert len(shapes) > 4
    assert set(shapes) == {(2, True)}


def test_logits_are_at_least_float32():
    for dtype in (torch.bfloat16, torch.float32):
        model = tiny_model("llama", dtype)
        assert model.logits(model.encode(PROMPTS)).dtype == torch.float32
    assert tiny_model().logits(torch.tensor([[1, 2]])).dtype == torch.float64


def test_the_soft_cap_is_in_the_logits():
    model = tiny_model("gemma2")
    assert model.hf.config.final_logit_softcapping == 30.0
    with torch.no_grad():
        model.hf.get_input_embeddings().weight *= 1e3
    assert model.logits(torch.tensor([[1, 2]])).abs().max() <= 30.0


def test_rows_that_are_not_finite_are_named():
    model = tiny_model("llama-untied")
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[5] = torch.inf
    with pytest.raises(NonFiniteError, match=r"rows \[1\] of 2"):
        model.logits(torch.tensor([[1, 2], [1, 5]]))


def test_token_losses_are_those_of_the_whole_logits():
    model = tiny_model("qwen2")
    ids = torch.arange(12).view(2, 6)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 4:] = False
    with torch.no_grad():
        logits = model.hf(input_ids=ids).logits
    expected = -logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(model.token_losses(ids), expected, rtol=1e-6, atol=1e-6)
    masked = model.token_losses(ids, mask)
    assert masked[1, 3:].tolist() == [0.0, 0.0]
    torch.testing.assert_close(masked[0], expected[0], rtol=1e-6, atol=1e-6)


# Edits -----------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("kind", KINDS)
def test_every_site_is_a_tensor_of_the_stream_and_can_be_undone(name, kind):
    model, seen = tiny_model(name), []
    ids = torch.arange(8).view(2, 4)
    before = model.logits(ids)
    for layer in range(model.n_layers):
        site = Site(layer, kind)
        undo_record = record(model, site, seen)
        undo = model.intercept(site, lambda x: x + torch.linspace(-1, 1, x.shape[-1]).to(x))
        assert (model.logits(ids) - before).abs().max() > 1e-6, site
        assert seen.pop().shape == (2, 4, model.d_model)
        undo()
        undo_record()
        assert torch.equal(model.logits(ids), before)
    assert not any(module._forward_hooks for module in model.hf.modules())
    assert not any(module._forward_pre_hooks for module in model.hf.modules())


@every_family
def test_what_leaves_a_block_enters_the_next(name):
    model, out, into = tiny_model(name), [], []
    for layer in range(model.n_layers - 1):
        record(model, Site(layer, "resid_post"), out)
        record(model, Site(layer + 1, "resid_pre"), into)
    model.logits(torch.arange(8).view(2, 4))
    assert len(out) == model.n_layers - 1
    assert all(torch.equal(a, b) for a, b in zip(out, into, strict=True))


def test_the_model_is_restored_when_the_pass_fails():
    model = tiny_model()
    before = model.logits(torch.tensor([[1, 2, 3]]))

    def fail(x):
        raise ZeroDivisionError

    undo = model.intercept(Site(1, "mlp_out"), fail)
    with pytest.raises(ZeroDivisionError):
        model.logits(torch.tensor([[1, 2, 3]]))
    assert model.chunk is None
    with pytest.raises(ZeroDivisionError):
        model.generate(["a tree"], max_new_tokens=2)
    assert model.chunk is None
    undo()
    assert torch.equal(model.logits(torch.tensor([[1, 2, 3]])), before)


def test_edits_of_one_site_run_in_the_order_they_were_set():
    model, seen = tiny_model(), []
    site, ids = Site(1, "attn_out"), torch.tensor([[1, 2]])

    def note(name):
        return lambda x: seen.append(name) or x

    first, same = note("a"), note("b")
    undo_a = model.intercept(site, first)
    undo_b = model.intercept(site, same)
    undo_c = model.intercept(site, first)
    model.logits(ids)
    assert seen == ["a", "b", "a"]
    undo_c()  # The later of two equal edits, so the first one keeps its place.
    seen.clear()
    model.logits(ids)
    assert seen == ["a", "b"]
    undo_a()
    undo_b()


def test_an_undo_that_is_called_again_leaves_later_edits_alone():
    model, seen = tiny_model(), []
    site = Site(0, "resid_pre")
    undo = model.intercept(site, lambda x: x)
    undo()
    record(model, site, seen)
    undo()
    model.logits(torch.tensor([[1, 2]]))
    assert len(seen) == 1


def test_an_edit_may_undo_itself_while_it_runs():
    model, undos = tiny_model(), []
    site, seen = Site(1, "resid_pre"), []

    def once(x):
        undos[0]()
        return x

    undos.append(model.intercept(site, once))
    record(model, site, seen)
    model.logits(torch.tensor([[1, 2]]))
    model.logits(torch.tensor([[1, 2]]))
    assert len(seen) == 2


@every_family
def test_a_tensor_that_was_read_is_not_written_to_later(name):
    model, held, copies = tiny_model(name), [], []
    for site in (*model.write_sites, *model.stream_sites):
        model.intercept(site, lambda x: (held.append(x), copies.append(x.clone()), 0.5 * x)[2])
    model.logits(torch.arange(8).view(2, 4))
    assert len(held) == len(model.write_sites) + len(model.stream_sites)
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))


def test_a_site_that_the_model_does_not_have_is_an_error():
    model = tiny_model()
    for layer in (3, -1):
        with pytest.raises(FamilyError, match="blocks 0 to 2"):
            model.intercept(Site(layer, "resid_pre"), lambda x: x)


def test_sites_are_listed_once_and_in_order():
    model = tiny_model()
    assert [str(site) for site in model.write_sites] == [
        "0.resid_pre",
        *(f"{i}.{kind}" for i in range(3) for kind in ("attn_out", "mlp_out")),
    ]
    assert [str(site) for site in model.stream_sites] == [
        "0.resid_pre",
        "1.resid_pre",
        "2.resid_pre",
        "2.resid_post",
    ]


# What a pass works on ----------------------------------------------------------------------------


def chunks_of(model, run):
    seen = []
    undo = model.intercept(Site(1, "resid_pre"), lambda x: seen.append((model.chunk, x.shape)) or x)
    run()
    undo()
    assert model.chunk is None
    return seen


def test_a_pass_over_whole_rows_knows_its_spans():
    model = tiny_model()
    batch = model.encode(PROMPTS)
    with model.whole_rows():
        [(chunk, shape)] = chunks_of(model, lambda: model.logits(batch))
    assert not chunk.is_prefix
    assert chunk.rows.tolist() == [0, 1, 2]
    assert torch.equal(chunk.ends, batch.ends)
    for span, mask in batch.spans.items():
        assert torch.equal(chunk.spans[span], mask)
        assert mask.shape == shape[:2]


def test_a_shared_prefix_is_a_pass_of_its_own():
    model = tiny_model()
    batch = model.encode(PROMPTS)
    (prefix, first), (rest, second) = chunks_of(model, lambda: model.logits(batch))
    assert first[:2] == (1, batch.shared)
    assert second[:2] == (3, batch.ids.shape[1] - batch.shared)
    assert prefix.is_prefix
    assert prefix.rows is None
    assert prefix.ends.tolist() == [0]
    assert not any(mask.any() for mask in prefix.spans.values())
    assert torch.equal(rest.ends, batch.ends - batch.shared)
    assert torch.equal(rest.spans[Span.INSTRUCTION], batch.spans[Span.INSTRUCTION][:, -second[1] :])


def test_generation_has_a_prompt_and_then_replies():
    model = tiny_model()
    seen = chunks_of(model, lambda: model.generate(PROMPTS, max_new_tokens=4))
    (prefix, first), (prompt, shape), *steps = seen
    batch = model.encode(PROMPTS)
    assert prefix.is_prefix
    assert first[:2] == (1, batch.shared)
    assert Span.RESPONSE not in prompt.spans
    assert prompt.spans[Span.POST_INSTRUCTION].sum(1).tolist() == [model.template.n_post] * 3
    assert prompt.rows.tolist() == [0, 2, 1]  # Sorted by length.
    assert torch.equal(prompt.ends, batch.ends[[0, 2, 1]] - batch.shared)
    assert shape[:2] == (3, prompt.ends.max())
    assert len(steps) == 3
    for step, width in steps:
        assert width[:2] == (3, 1)
        assert step.spans[Span.RESPONSE].all()
        assert not step.spans[Span.INSTRUCTION].any()
        assert step.rows.tolist() == [0, 2, 1]


def test_rows_of_later_batches_keep_their_numbers():
    model = tiny_model()
    seen = chunks_of(model, lambda: model.generate(PROMPTS, max_new_tokens=1, batch_size=2))
    rows = [chunk.rows.tolist() for chunk, _ in seen if not chunk.is_prefix]
    assert rows == [[0, 2], [1]]
    batch = model.encode(PROMPTS).rows([2, 1])
    seen = chunks_of(model, lambda: model.logits(batch))
    assert seen[-1][0].rows.tolist() == [2, 1]


def test_runs_count_passes():
    model = tiny_model()
    batch = model.encode(PROMPTS)
    model.logits(batch)
    assert model.runs == 2  # The prefix and the rest.
    with model.whole_rows():
        model.logits(batch)
    assert model.runs == 3
    model.generate(PROMPTS, max_new_tokens=4)
    assert model.runs == 8


# Generation --------------------------------------------------------------------------------------


def by_argmax(model, ids, n):
    """What a plain loop writes behind one row, the whole row computed anew for each token."""
    written = []
    for _ in range(n):
        token = int(model.logits(ids).argmax())
        if token in model.stop_ids:
            break
        written.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return written


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "qwen3-moe"])
def test_replies_are_those_of_a_plain_loop_over_argmax(name):
    model = tiny_model(name)
    replies = model.generate(PROMPTS, max_new_tokens=6, batch_size=2)
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        expected = by_argmax(model, model.encode([prompt]).ids, 6)
        assert list(reply.ids) == expected
        assert reply.finished == (len(expected) < 6)


@every_family
def test_rows_that_end_make_room_for_others_and_change_nothing(name):
    model = tiny_model(name)
    asked = [f"Where is {'the old ' * (i % 4)}tree {i}?" for i in range(9)]
    whole = [model.generate([text], max_new_tokens=12)[0] for text in asked]
    # End tokens that some replies hit early, some late and some never, where a model says enough.
    first = {reply.ids[0] for reply in whole}
    early = [token for reply in whole for token in reply.ids[2:9:3] if token not in first][:4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "stop_ids", early)
        alone = [model.generate([text], max_new_tokens=12)[0] for text in asked]
        done = []
        together = model.generate(asked, max_new_tokens=12, batch_size=3, progress=done.append)
    assert together == alone
    assert sum(done) == len(asked)
    assert name != "llama" or len({len(reply.ids) for reply in alone}) > 2


def test_states_are_those_that_chose_the_tokens():
    model = tiny_model("llama")
    asked = [f"Where is {'the old ' * (i % 3)}tree {i}?" for i in range(5)]
    replies = model.generate(asked, max_new_tokens=6, batch_size=2, with_states=True)
    for prompt, reply in zip(asked, replies, strict=True):
        assert len(reply.states) == len(reply.ids) + reply.finished
        ids = torch.cat([model.encode([prompt]).ids[0], torch.tensor(reply.ids)])
        whole = model.final_states(TokenBatch.of_ids(ids.unsqueeze(0)))[0]
        first = len(ids) - len(reply.ids) - 1
        expected = whole[first : first + len(reply.states)]
        torch.testing.assert_close(reply.states, expected, rtol=1e-4, atol=1e-5)
    assert replies == model.generate(asked, max_new_tokens=6, batch_size=2)


def test_a_reply_ends_where_its_reader_says_so():
    model = tiny_model("llama")
    asked = [f"Where is tree {i}?" for i in range(6)]
    whole = model.generate(asked, max_new_tokens=30)
    heard = []

    def until(numbers, texts):
        heard.extend(zip(numbers, texts, strict=True))
        return [number % 2 == 0 for number in numbers]

    cut = model.generate(asked, max_new_tokens=30, batch_size=4, until=until)
    for i, (long, short) in enumerate(zip(whole, cut, strict=True)):
        if i % 2 == 0 and len(long.ids) > 8:
            assert short.ids == long.ids[:8]
            assert not short.finished
        else:
            assert short == long
    assert (1, whole[1].text) not in heard  # A reply of 30 tokens was last asked about at 24.
    assert all(whole[number].text.startswith(text[:-1]) for number, text in heard)


ASKED = [f"Where is {'the old ' * (i % 4)}tree {i}?" for i in range(9)]


def drawn(model, asked=ASKED, **options):
    return model.generate(asked, **{"max_new_tokens": 12, "temperature": 2.0} | options)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_what_is_drawn_hangs_on_seed_and_place_but_not_on_the_batch(name):
    model = tiny_model(name)
    first = drawn(model, seed=3)
    assert drawn(model, seed=3) == first
    # Rows that end make room for others at other times, which must not shift anybody's draws.
    ends = [token for reply in first for token in reply.ids[2:9:3]][:4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "stop_ids", ends)
        for size in (1, 2, 5):
            assert drawn(model, seed=3, batch_size=size) == drawn(model, seed=3)
        assert any(reply.finished for reply in drawn(model, seed=3))
    assert drawn(model, seed=3, batch_size=2) == first
    assert all(a.ids != b.ids for a, b in zip(first, drawn(model, seed=4), strict=True))
    again = drawn(model, [ASKED[0]] * 5, seed=3)
    assert len({reply.ids for reply in again}) == 5
    assert again[0] == first[0]


def test_towards_no_temperature_the_likeliest_is_drawn():
    model = tiny_model("llama")
    greedy = model.generate(ASKED, max_new_tokens=8)
    assert drawn(model, max_new_tokens=8, temperature=1e-6) == greedy
    assert drawn(model, max_new_tokens=8, temperature=2.0) != greedy
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="temperature"):
            drawn(model, temperature=wrong)


@pytest.mark.parametrize("temperature", [0.3, 0.7])
def test_tokens_are_drawn_as_often_as_the_softmax_says(temperature):
    model = tiny_model("llama")
    n = 4000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "stop_ids", [])
        replies = drawn(
            model, PROMPTS[:1] * n, max_new_tokens=2, temperature=temperature, batch_size=1000
        )
    batch = model.encode(PROMPTS[:1])
    first = (model.logits(batch)[0] / temperature).softmax(0)
    # And the second among those that began alike: it must not hang on the draw of the first.
    often = torch.tensor([reply.ids[0] for reply in replies]).mode().values.item()
    ids = torch.cat([batch.ids, torch.tensor([[often]])], 1)
    second = (model.logits(ids)[0] / temperature).softmax(0)
    for chances, tokens in (
        (first, [reply.ids[0] for reply in replies]),
        (second, [reply.ids[1] for reply in replies if reply.ids[0] == often]),
    ):
        total = len(tokens)
        counts = torch.bincount(torch.tensor(tokens), minlength=len(chances)).double()
        kept = chances * total >= 5  # The others are pooled.
        expected = torch.cat([chances[kept], chances[~kept].sum().unsqueeze(0)]) * total
        seen = torch.cat([counts[kept], counts[~kept].sum().unsqueeze(0)])
        statistic = float(((seen - expected) ** 2 / expected).sum())
        assert int(kept.sum()) > 3
        assert stats.chi2.sf(statistic, len(seen) - 1) > 1e-3


def test_what_has_no_chance_is_not_drawn_and_no_number_is_no_chance():
    draw = Sampling(1.0, 0)
    logits = torch.full((300, 5), -torch.inf)
    logits[:, [1, 3]] = 0.0
    assert set(draw(logits, range(300), [0] * 300).tolist()) == {1, 3}
    logits[7, 2] = torch.nan
    with pytest.raises(NonFiniteError):
        draw(logits, range(300), [0] * 300)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3-moe"])
def test_gradients_are_what_small_additions_do(name):
    model = tiny_model(name, torch.float64)
    batch = model.encode(PROMPTS)
    sites = [Site(0, "resid_pre"), Site(1, "resid_pre"), model.stream_sites[-1]]

    def score(logits):
        return logits[:, 7] - logits[:, 11]

    plain, slopes = model.gradients(batch, score, sites)
    torch.testing.assert_close(plain, score(model.logits(batch)))
    rng = torch.Generator().manual_seed(0)
    for site in sites:
        way = torch.randn(model.d_model, generator=rng, dtype=torch.float64)
        ends = []
        for step in (1e-4, -1e-4):  # Norms run in float32 at most.
            undo = model.intercept(site, lambda x, step=step, way=way: x + step * way)
            ends.append(score(model.logits(batch)))
            undo()
        slope = (ends[0] - ends[1]) / 2e-4
        torch.testing.assert_close(slopes[site] @ way, slope, rtol=1e-2, atol=5e-3)
    assert all(one.requires_grad for one in model.hf.parameters())
    assert not model._hooks


def test_an_edit_of_some_prompts_follows_them_through_the_batches():
    model = tiny_model("llama")
    asked = [f"Where is tree {i}?" for i in range(7)]
    plain = model.generate(asked, max_new_tokens=6)
    when = torch.tensor([i % 3 == 0 for i in range(7)])
    way = Direction.from_vector(
        torch.arange(32.0) - 9, site=Site(1, "resid_pre"), position=-1, recipe=""
    )
    with applied(model, Add(way, 0.3), when=when):
        some = model.generate(asked, max_new_tokens=6, batch_size=2)
    with applied(model, Add(way, 0.3)):
        every = model.generate(asked, max_new_tokens=6)
    assert [reply.ids for reply in some] == [
        (every if edited else plain)[i].ids for i, edited in enumerate(when.tolist())
    ]
    assert any(a.ids != b.ids for a, b in zip(plain, every, strict=True))


def test_an_edit_is_in_force_at_every_step_of_generation():
    model = tiny_model()
    before = model.generate(PROMPTS, max_new_tokens=5)
    forced = torch.zeros(model.d_model, dtype=torch.float64)
    undo = model.intercept(Site(2, "resid_post"), lambda x: torch.zeros_like(x) + forced)
    # The stream is zero, so every token has the same logit and the first id wins.
    assert all(reply.ids == (0,) * 5 for reply in model.generate(PROMPTS, max_new_tokens=5))
    undo()
    assert model.generate(PROMPTS, max_new_tokens=5) == before


def _speaks(model, tokens):
    """Have the model say `tokens`, then again from the start, whatever it is asked."""
    steps = iter([])
    table = torch.zeros(VOCAB, model.d_model, dtype=torch.float64)
    for i, token in enumerate(tokens):
        table[token, i] = 10.0
    with torch.no_grad():
        model.hf.lm_head.weight.copy_(table)
        model.hf.model.norm.weight.fill_(1.0)

    def say(x):
        nonlocal steps
        if x.shape[1] > 1:
            steps = iter(range(len(tokens)))
        out = torch.zeros_like(x)
        out[..., next(steps)] = 1.0
        return out

    model.intercept(Site(2, "resid_post"), say)


def test_a_reply_ends_at_the_end_of_turn_and_has_no_markers():
    model = tiny_model("llama-untied")
    tokenizer = model.template.tokenizer
    words = tokenizer("a small tree", add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in model.stop_ids
    _speaks(model, [*words, end, *words, *words])
    for reply in model.generate(PROMPTS, max_new_tokens=20):
        assert (reply.text, reply.ids, reply.finished) == ("a small tree", tuple(words), True)
    [cut] = model.generate(PROMPTS[:1], max_new_tokens=2)
    assert (len(cut.ids), cut.finished) == (2, False)


def test_closed_thinking_is_not_part_of_a_reply():
    model = tiny_model("llama-untied", template="qwen3")
    tokenizer = model.template.tokenizer
    ids = tokenizer("<think>\na\n</think>\n\na tree", add_special_tokens=False)["input_ids"]
    _speaks(model, [*ids, *model.stop_ids])
    [reply] = model.generate(["a tree"], max_new_tokens=30)
    assert reply.text == "a tree"
    assert reply.ids == tuple(ids)


def test_progress_counts_prompts():
    done = []
    tiny_model().generate(PROMPTS, max_new_tokens=1, batch_size=2, progress=done.append)
    assert done == [2, 1]


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_generates_and_stops(template):
    model = tiny_model("llama", template=template)
    assert len(model.generate(PROMPTS, max_new_tokens=2)) == 3
    assert all(0 <= token < VOCAB for token in model.stop_ids)


# The model itself --------------------------------------------------------------------------------


def test_a_model_without_a_tokenizer_says_so():
    hf = tiny_hf("llama")
    model = Model(hf, family_of("llama"))
    assert model.logits(torch.tensor([[1, 2]])).shape == (1, VOCAB)
    for call in (lambda: model.encode(["a"]), lambda: model.generate(["a"], max_new_tokens=1)):
        with pytest.raises(TemplateError, match="without a tokenizer"):
            call()


def test_a_twin_keeps_ties_and_shares_nothing():
    model = tiny_model("llama", torch.float32)
    twin = model.twin(torch.bfloat16)
    assert model.tied
    assert twin.tied
    assert (model.dtype, twin.dtype) == (torch.float32, torch.bfloat16)
    assert not tiny_model("llama-untied", torch.float32).twin(torch.bfloat16).tied
    assert model.twin(torch.float32) is model
    batch = model.encode(PROMPTS)
    before = model.logits(batch)
    apart = (twin.logits(batch) - before).norm() / before.norm()
    assert 0 < apart < 5e-2
    with torch.no_grad():
        twin.hf.get_input_embeddings().weight.zero_()
    assert torch.equal(model.logits(batch), before)


def test_a_twin_keeps_rotary_frequencies_in_full():
    model = tiny_model("llama", torch.float32)
    twin = model.twin(torch.bfloat16)
    ours, theirs = model.hf.model.rotary_emb.inv_freq, twin.hf.model.rotary_emb.inv_freq
    assert theirs.dtype == torch.float32
    assert torch.equal(ours, theirs)


def test_a_twin_is_not_made_of_a_model_that_is_being_edited():
    model = tiny_model("llama", torch.float32)
    undo = model.intercept(Site(0, "mlp_out"), lambda x: x)
    with pytest.raises(FamilyError, match=r"edited at 0\.mlp_out"):
        model.twin(torch.bfloat16)
    undo()
    model.twin(torch.bfloat16)


@every_family
def test_the_fingerprint_is_that_of_weights_and_template(name):
    model = tiny_model(name)
    print_ = model.fingerprint
    assert tiny_model(name).fingerprint == print_
    assert tiny_model(name, seed=1).fingerprint != print_
    assert tiny_model(name, torch.float32).fingerprint != print_
    assert tiny_model(name, system="Be brief.").fingerprint != print_
    with torch.no_grad():
        weight = next(p for p in model.blocks[1].parameters() if p.ndim == 2)
        weight[:, 3] += 0.1
    assert model.fingerprint != print_


def test_an_edit_of_one_column_of_a_large_matrix_moves_the_fingerprint():
    model = tiny_model("llama")
    model.blocks[0].mlp.extra = torch.nn.Linear(512, 512, bias=False)
    before = model.fingerprint
    for column in range(0, 512, 37):
        with torch.no_grad():
            model.blocks[0].mlp.extra.weight[:, column] += 1.0
        assert model.fingerprint != before
        before = model.fingerprint


def test_padding_is_a_token_that_the_embedding_has():
    model = tiny_model("llama")
    model.template.tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model.hf.resize_token_embeddings(model.template.tokenizer.pad_token_id)
    assert model.pad_id == model.template.tokenizer.eos_token_id


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_rows_without_the_templates_end_are_answered_from_the_instruction(name):
    model = tiny_model(name)
    batch = model.encode(PROMPTS)
    cut = batch.without_post()
    assert cut.ends.tolist() == (batch.ends - model.template.n_post).tolist()
    assert cut.shared == batch.shared
    assert not cut.spans[Span.POST_INSTRUCTION].any()
    replies = model.generate(cut, max_new_tokens=5, batch_size=2)
    for i, reply in enumerate(replies):
        expected = by_argmax(model, batch.ids[i : i + 1, : cut.ends[i]], 5)
        assert list(reply.ids) == expected


def test_rows_of_a_larger_batch_are_answered_in_the_order_given():
    model = tiny_model("llama")
    some = model.generate(model.encode(PROMPTS).rows([2, 0]), max_new_tokens=4)
    assert some == [model.generate([PROMPTS[i]], max_new_tokens=4)[0] for i in (2, 0)]


def test_a_request_is_told_from_the_question_behind_it():
    model = tiny_model("llama")
    alone = model.encode(PROMPTS)
    asked = model.encode([f"{text}\n\nIs that so?" for text in PROMPTS]).with_request(alone)
    request = asked.spans[Span.REQUEST]
    for i in range(len(PROMPTS)):
        own = alone.ids[i][alone.spans[Span.INSTRUCTION][i]].tolist()
        marked = asked.ids[i][request[i]].tolist()
        assert (
            len(own) - 1 <= len(marked) <= len(own)
        )  # The last token may merge with what follows.
        assert marked == own[: len(marked)]
    # An edit of the request reaches its tokens and no other.
    seen = []
    way = Direction.from_vector(
        torch.ones(model.d_model), site=Site(1, "resid_pre"), position=-1, recipe=""
    )
    with model.whole_rows():
        before = []
        undo = model.intercept(Site(1, "resid_pre"), lambda x: before.append(x) or x)
        model.logits(asked)
        undo()
        with applied(model, Add(way), where=Span.REQUEST):
            undo = model.intercept(Site(1, "resid_pre"), lambda x: seen.append(x) or x)
            model.logits(asked)
            undo()
    changed = (seen[0] - before[0]).abs().sum(2) > 0
    assert torch.equal(changed, request)


# Heads -----------------------------------------------------------------------------------------


@every_family
def test_heads_times_their_weights_are_what_attention_writes(name):
    model = tiny_model(name)
    batch = model.encode(PROMPTS)
    if not model.family.linear_writes:
        with pytest.raises(FamilyError, match="norm"):
            model.head_weights(1)
        with pytest.raises(FamilyError, match="norm"):
            model.intercept_heads(1, lambda x: x)
        return
    heads, writes = [], []
    with model.whole_rows():
        model.intercept_heads(1, lambda x: heads.append(x) or x)
        record(model, Site(1, "attn_out"), writes)
        before = model.logits(batch)
        weights, bias = model.head_weights(1)
        assert weights.shape == (4, 8, 32)
        apart = heads[0].reshape(*heads[0].shape[:2], 4, 8)
        each = torch.einsum("rthk,hkd->rthd", apart, weights)
        whole = each.sum(2) + (0 if bias is None else bias)
        torch.testing.assert_close(whole, writes[0], rtol=1e-10, atol=1e-10)
        undo = model.intercept_heads(1, lambda x: torch.cat([0 * x[..., :8], x[..., 8:]], -1))
        model.logits(batch)
        torch.testing.assert_close(writes[0] - writes[1], each[:, :, 0], rtol=1e-8, atol=1e-8)
        undo()
        assert torch.equal(model.logits(batch), before)
    with pytest.raises(FamilyError, match="blocks 0 to 2"):
        model.intercept_heads(3, lambda x: x)
