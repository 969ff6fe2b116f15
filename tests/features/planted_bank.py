"""A bank by hand for the model of `tests.planted`: one latent is refusal, and others look like it.

At the input of block 2, where `r` is refusal, latents
    0 reads r and writes r: what makes the model refuse;
    1 reads r and writes -r / 4: fires with harm, and holds refusal back;
    2 reads r and writes an idle axis: knows of harm, and refusal does not need it;
    3 fires at random and writes a little, nearly along r: cosine finds it, little hangs on it;
    4 never fires.
The others read and write random axes of what words say besides. Prompts hold one harmful word: with
two, the model is so sure that more of r does not make it surer.
"""

from dataclasses import replace
from functools import cache

import torch
from tests.planted import FILLER, HARMFUL, HARMLESS, PLANTED_LAYER, WIDTH, planted

from demur.features.bank import Bank
from demur.sites import Site

SITE = Site(PLANTED_LAYER, "resid_pre")
N = 160
PROMOTES, SUPPRESSES, IDLE, ALONG, DEAD = range(5)


@cache
def the_model():
    return planted()


def _used():
    """Axes that later blocks or the head read: refusal, what it becomes, the gate, the topic."""
    blocks = the_model().model.hf.model.layers
    r = the_model().direction
    mlp = blocks[PLANTED_LAYER].mlp
    r2 = mlp.down_proj.weight[:, 0] / mlp.down_proj.weight[:, 0].norm() * 2**0.5 + r
    topic = blocks[PLANTED_LAYER + 1].self_attn.o_proj.weight.T @ r2
    return torch.linalg.qr(torch.stack([r, r2, mlp.gate_proj.weight[0], topic]).T)[0].T.detach()


def the_bank(n=N, seed=0, name="bank"):
    r, used = the_model().direction, _used()
    rng = torch.Generator().manual_seed(seed)
    axes = torch.randn(n, WIDTH, generator=rng, dtype=torch.float64)
    axes -= axes @ used.T @ used
    encoder = axes / axes.norm(dim=1, keepdim=True)
    decoder = encoder.clone()
    bias = -0.2 - 0.6 * torch.rand(n, generator=rng, dtype=torch.float64)
    encoder[[PROMOTES, SUPPRESSES, IDLE]] = r
    bias[[PROMOTES, SUPPRESSES, IDLE]] = -0.3
    decoder[PROMOTES], decoder[SUPPRESSES] = r, -0.25 * r
    decoder[ALONG] = 0.05 * (r + 0.3 * decoder[ALONG])
    decoder[IDLE] *= 0.05
    bias[DEAD] = -1e3
    return Bank(
        name=name,
        site=SITE,
        encoder=encoder,
        bias=bias,
        decoder=decoder,
        offset=torch.zeros(WIDTH, dtype=torch.float64),
        ids=torch.arange(n),
        width=n,
    )


def prompts(n, words, seed):
    rng = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(n):
        own = [FILLER[i] for i in torch.randint(len(FILLER), (7,), generator=rng).tolist()]
        place, which = torch.randint(7, (2,), generator=rng).tolist()
        own[place] = words[which]
        out.append(" ".join(own))
    return out


def split(seed, n=24):
    """Harmful and harmless prompts."""
    return prompts(n, HARMFUL, seed), prompts(n, HARMLESS, seed + 1)


def moved(bank, name, site, writes=None):
    """The same latents at another site."""
    return replace(bank, name=name, site=site, writes=writes or site)
