"""Banks from files: SAELens, Gemma Scope, sparsify and dictionary_learning, read row by row.

Each format is one entry of the registry `formats`: it says which files it is for, where they keep
their matrices, and under which conventions these were trained. What a file does not say, and what
would change numbers, is asked for and never guessed. Nothing that runs code on load is read.

===================== ========================================== ==================================
format                files                                      conventions
===================== ========================================== ==================================
`saelens`             `cfg.json`, `sae_weights.safetensors`      as `cfg.json` says
`gemma-scope`         `params.npz`, `params.safetensors`         JumpReLU; the offset is not taken
                                                                 off the input
`sparsify`            `cfg.json`, `sae.safetensors`              TopK; the offset is taken off the
                                                                 input, but not by transcoders
`dictionary-learning` `ae.pt`, `config.json`                     as its `dict_class` says
===================== ========================================== ==================================

A release of SAELens is named `saelens:RELEASE/SAE_ID`; it needs the extra `sae`.

Only what is asked for is read. Matrices that lie latent by latent are read in runs of rows, the
others in blocks of whole rows: a bank of 65,536 latents is never in memory twice.

References:
    Gao et al. 2024, arXiv:2406.04093 (TopK); Bussmann et al. 2024, arXiv:2412.06410 (BatchTopK);
    Rajamanoharan et al. 2024, arXiv:2407.14435 (JumpReLU), arXiv:2404.16014 (gated); Lieberum et
    al. 2024, arXiv:2408.05147 (Gemma Scope); Dunefsky et al. 2024, arXiv:2406.11944 (transcoders).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from demur.errors import ConfigError, MissingExtraError, StoreError
from demur.features.arrays import (
    Arrays,
    Held,
    Matrix,
    NpzFile,
    SafetensorsFile,
    TorchFile,
    vector,
)
from demur.features.bank import Activation, Bank, Normalise
from demur.models import Model
from demur.registry import Registry
from demur.sites import Site, SiteKind
from demur.store import file_digests, sealed, strict_json

CHUNK = 4096  # Latents that are worked on at once; of width 2,304 they take 38 MB.
_RELEASE = "saelens:"
_CONFIG, _SAE_WEIGHTS = "cfg.json", "sae_weights.safetensors"

# A bank that is not read yet ------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The encoder of some latents, folded as in a `Bank`.

    Attributes:
        ids: Their numbers in the whole bank.
        encoder: One row a latent.
        bias: Of the encoder.
        threshold: Of a "jumprelu" bank.
    """

    ids: Int[Tensor, " latent"]
    encoder: Float[Tensor, "latent d_model"]
    bias: Float[Tensor, " latent"]
    threshold: Float[Tensor, " latent"] | None


@dataclass(frozen=True, slots=True, eq=False)
class StoredBank:
    """A bank on disk: what it is like, and where its matrices lie.

    Fields that `Bank` has too mean the same.

    Attributes:
        arrays: The file.
        encoder: Where its encoder lies.
        decoder: Where its decoder lies.
        bias: Array with the encoder's bias; None for zeros.
        offset: Array with the decoder's bias; None for zeros.
        threshold: Array with thresholds, one number for all, or None.
        factor: What the input is multiplied by before encoding, and what comes out divided by.
        by_norm: Whether activations are measured by decoder rows of length 1.
        gate: Arrays of a gated encoder: bias of the gate, and logarithm of the magnitude's scale.
    """

    name: str
    site: Site
    writes: Site
    arrays: Arrays
    encoder: Matrix
    decoder: Matrix
    width: int
    d_model: int
    activation: Activation
    bias: str | None = None
    offset: str | None = None
    threshold: str | float | None = None
    k: int | None = None
    centred: bool = False
    normalise: Normalise = "none"
    largest_norm: float | None = None
    factor: float = 1.0
    by_norm: bool = False
    gate: tuple[str, str] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.width

    def ids_of(self, ids: Sequence[int] | Int[Tensor, " n"] | None) -> Int[Tensor, " n"]:
        """Numbers of latents, all if None.

        Raises:
            ConfigError: One is out of range.
        """
        if ids is None:
            return torch.arange(self.width)
        out = torch.as_tensor(ids, dtype=torch.long)
        bad = out[(out < 0) | (out >= self.width)]
        if len(bad):
            raise ConfigError(
                f"{self.name} has no latent {int(bad[0])}",
                f"it has {self.width}; numbers count from 0",
            )
        return out

    def part(self, ids: Sequence[int] | Int[Tensor, " n"] | None = None) -> Part:
        """The encoder of some latents; decoder rows are only read where they set the scale."""
        which = self.ids_of(ids)
        norms = self._decoder(which).norm(dim=1) if self.by_norm else None
        return self._part(which, norms)

    def _part(self, which: Tensor, norms: Tensor | None) -> Part:
        encoder = self.encoder.rows(self.arrays, which)
        if self.factor != 1.0:
            encoder *= self.factor
        zero = torch.zeros(len(which))
        bias = zero if self.bias is None else vector(self.arrays, self.bias)[which]
        threshold = None
        if isinstance(self.threshold, str):
            threshold = vector(self.arrays, self.threshold)[which]
        elif self.threshold is not None:
            threshold = torch.full((len(which),), self.threshold)
        if self.gate is not None:
            gate, size = (vector(self.arrays, name)[which] for name in self.gate)
            encoder *= size.exp().unsqueeze(1)
            # The gate is open where the magnitude lies above this.
            threshold = bias - size.exp() * gate
        if norms is not None:
            encoder *= norms.unsqueeze(1)
            bias = bias * norms
            # The threshold was learnt before `factor` was folded into the decoder.
            threshold = None if threshold is None else threshold / self.factor
        return Part(which, encoder, bias, threshold)

    def parts(self, size: int = CHUNK) -> Iterator[Part]:
        """The whole encoder, some latents at a time."""
        for start in range(0, self.width, size):
            yield self.part(torch.arange(start, min(start + size, self.width)))

    def _decoder(self, which: Tensor) -> Tensor:
        out = self.decoder.rows(self.arrays, which)
        if self.factor != 1.0:
            out /= self.factor
        return out

    def bank(self, ids: Sequence[int] | Int[Tensor, " n"] | None = None) -> Bank:
        """Read it, all latents or some.

        Raises:
            ConfigError: A latent is out of range.
        """
        which = self.ids_of(ids)
        decoder = self._decoder(which)
        norms = None
        if self.by_norm:
            norms = decoder.norm(dim=1)
            decoder /= norms.clamp_min(torch.finfo(norms.dtype).tiny).unsqueeze(1)
        part = self._part(which, norms)
        offset = torch.zeros(self.d_model)
        if self.offset is not None:
            offset = vector(self.arrays, self.offset) / self.factor
        whole = None
        if self.k is not None and 0 < len(which) < self.width:
            whole = self._selector(offset)
        return Bank(
            name=self.name,
            site=self.site,
            encoder=part.encoder,
            bias=part.bias,
            decoder=decoder,
            offset=offset,
            ids=which,
            width=self.width,
            activation=self.activation,
            writes=self.writes,
            centred=self.centred,
            threshold=part.threshold,
            k=self.k,
            normalise=self.normalise,
            largest_norm=self.largest_norm,
            whole=whole,
            about=self.about,
        )

    def _selector(self, offset: Tensor) -> Bank:
        """All encoders of a "topk" bank, which decide on the k largest; it decodes nothing."""
        part = self.part()
        return Bank(
            name=self.name,
            site=self.site,
            encoder=part.encoder,
            bias=part.bias,
            # One row that stands for all, so that it takes no memory.
            decoder=torch.zeros(1, self.d_model).expand(self.width, -1),
            offset=offset,
            ids=part.ids,
            width=self.width,
            activation=self.activation,
            writes=self.writes,
            centred=self.centred,
            k=self.k,
            normalise=self.normalise,
            largest_norm=self.largest_norm,
            about=self.about,
        )


class Format(Protocol):
    """One kind of file."""

    def fits(self, path: Path) -> bool:
        """Whether a path that exists looks like it; opens no weights."""
        ...

    def read(self, path: Path, name: str, site: Site | None) -> StoredBank:
        """Read what it is like.

        Args:
            path: A file or folder.
            name: What tables call it.
            site: The tensor that it reads, where the user says so; else the files have to.

        Raises:
            StoreError: It is damaged, incomplete, or needs pickle.
            ConfigError: It cannot be expressed as a `Bank`, or does not say which tensor it reads.
        """
        ...


formats: Registry[Format] = Registry("bank format")


def open_bank(
    source: str | Path,
    *,
    site: Site | str | None = None,
    name: str | None = None,
    kind: str | None = None,
    largest_norm: float | None = None,
) -> StoredBank:
    """Read what a bank is like, and none of its weights.

    Args:
        source: A file or folder, `saelens:RELEASE/SAE_ID`, or the name of a packaged bank.
        site: The tensor that it reads; it wins over what the files say.
        name: What tables call it; None: after the folder.
        kind: Name of the format; None: found from the files.
        largest_norm: Tokens with a larger norm are sinks; it wins over what the files say.

    Raises:
        StoreError: There is no such path, no format or several fit it, or it is damaged.
        ConfigError: It cannot be expressed, or does not say which tensor it reads.
        UnknownNameError: There is no such format.
        MissingExtraError: A release is asked for, and `sae_lens` is not installed.
    """
    at = Site.parse(site) if isinstance(site, str) else site
    if isinstance(source, str) and source.startswith(_RELEASE):
        out = _release(source, at, name)
    else:
        path = _found(source)
        if kind is None:
            kind = _kind_of(path)
        own = name or (path.name if path.is_dir() else path.parent.name or path.stem)
        out = formats.make(kind).read(path, own, at)
    return out if largest_norm is None else replace(out, largest_norm=largest_norm)


def load_bank(
    source: str | Path,
    *,
    ids: Sequence[int] | Int[Tensor, " n"] | None = None,
    site: Site | str | None = None,
    name: str | None = None,
    kind: str | None = None,
    largest_norm: float | None = None,
    device: torch.device | str = "cpu",
) -> Bank:
    """Read a bank, all latents or some; arguments and errors are those of `open_bank`.

    Args:
        source: A file or folder, `saelens:RELEASE/SAE_ID`, or the name of a packaged bank.
        ids: Which latents to read; None: all. Of a "topk" bank all encoders are read even so,
            since they decide on the k largest.
        site: The tensor that it reads; it wins over what the files say.
        name: What tables call it; None: after the folder.
        kind: Name of the format; None: found from the files.
        largest_norm: Tokens with a larger norm are sinks; it wins over what the files say.
        device: Where its tensors go.
    """
    stored = open_bank(source, site=site, name=name, kind=kind, largest_norm=largest_norm)
    bank = stored.bank(ids)
    return bank if torch.device(device).type == "cpu" else bank.to(device)


def packaged_banks() -> dict[str, Path]:
    """Folders of banks that come with demur, by name; each holds one folder a site."""
    root = Path(str(files("demur") / "data" / "banks"))
    if not root.is_dir():
        return {}
    return {one.name: one for one in sorted(root.iterdir()) if one.is_dir()}


def load_banks(
    spec: str | Path, *, device: torch.device | str = "cpu", largest_norm: float | None = None
) -> tuple[Bank, ...]:
    """Read one bank, or all that lie in a folder or are packaged under a name, in order of sites.

    Raises:
        StoreError: There is nothing to read; else as `load_bank`.
    """
    if isinstance(spec, str) and spec.startswith(_RELEASE):
        return (load_bank(spec, device=device, largest_norm=largest_norm),)
    path = _found(spec)
    if any(formats.make(one).fits(path) for one in formats):
        return (load_bank(path, device=device, largest_norm=largest_norm),)
    inner = [
        one
        for one in (sorted(path.iterdir()) if path.is_dir() else [])
        if one.is_dir() and any(formats.make(kind).fits(one) for kind in formats)
    ]
    if not inner:
        raise StoreError(
            f"{path} holds no bank",
            "give a folder with the files of a bank, or one of such folders",
        )
    banks = [
        load_bank(one, name=f"{path.name}/{one.name}", device=device, largest_norm=largest_norm)
        for one in inner
    ]
    return tuple(sorted(banks, key=lambda one: (one.site, one.name)))


def _found(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.exists():
        return path
    known = packaged_banks()
    if str(source) in known:
        return known[str(source)]
    near = get_close_matches(str(source), known, n=1)
    also = f"; packaged are {', '.join(known)}" if known else ""
    raise StoreError(
        f"there is no {source}",
        f"did you mean `{near[0]}`?" if near else f"check the path{also}",
    )


def _kind_of(path: Path) -> str:
    fitting = [one for one in formats if formats.make(one).fits(path)]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting and path.is_dir():
        inner = [
            one
            for one in sorted(path.iterdir())
            if one.is_dir() and any(formats.make(kind).fits(one) for kind in formats)
        ]
        if inner:
            raise StoreError(
                f"{path} holds {len(inner)} banks",
                f"name one, such as {inner[0]}, or read all with `load_banks`",
            )
    what = f"fits several kinds, {', '.join(fitting)}" if fitting else "is of no known kind"
    raise StoreError(f"{path} {what} of banks", f"name its kind, one of: {', '.join(formats)}")


# Hook names ----------------------------------------------------------------------------------

_LENS = re.compile(r"blocks\.(\d+)\.hook_(resid_pre|resid_post|attn_out|mlp_out)")
_MODULE = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)(?:\.(.+))?")
_MODULES: Mapping[str, SiteKind] = {
    "": "resid_post",
    "input": "resid_pre",
    "self_attn": "attn_out",
    "self_attn.o_proj": "attn_out",
    "attn": "attn_out",
    "attn.c_proj": "attn_out",
    "attention": "attn_out",
    "attention.dense": "attn_out",
    "mlp": "mlp_out",
    "mlp.input": "mlp_in",
    "pre_feedforward_layernorm": "mlp_in",
    "mlp.down_proj": "mlp_out",
    "mlp.c_proj": "mlp_out",
    "mlp.dense_4h_to_h": "mlp_out",
    # Only where a norm stands behind attention and MLP; `fits` knows.
    "post_attention_layernorm": "attn_out",
    "post_feedforward_layernorm": "mlp_out",
}
_NO_SITE = (
    (re.compile(r"hook_z|o_proj\.input"), "what the heads give before they are mixed"),
    (
        re.compile(r"ln2|mlp_in|mlp\.hook_in"),
        "what the MLP reads, which hooks of that name give with or without the norm and its gain; "
        "with both it is the site `mlp_in`",
    ),
    (re.compile(r"resid_mid"), "the stream between attention and MLP"),
)


def site_of(hook: str) -> Site | None:
    """The site that a hook name of TransformerLens or a module path of transformers stands for.

    `blocks.20.hook_resid_post`, `model.layers.20`, `layers.20` and `model.layers.20.output` are all
    `20.resid_post`; `layers.5.mlp` is `5.mlp_out`. None for what demur has no site for.
    """
    if found := _LENS.fullmatch(hook):
        return Site(int(found[1]), cast(SiteKind, found[2]))
    if any(pattern.search(hook) for pattern, _ in _NO_SITE):
        return None
    if found := _MODULE.fullmatch(hook):
        inner = (found[2] or "").removesuffix(".output")
        kind = _MODULES.get("" if inner == "output" else inner)
        return None if kind is None else Site(int(found[1]), kind)
    return None


def _site(hook: str | None, given: Site | None, what: str, *, role: str = "reads") -> Site:
    """The site of a hook, unless the user says otherwise."""
    if given is not None:
        return given
    hint = "say which tensor it is: `site=` with one like 20.resid_post"
    if not hook:
        raise ConfigError(f"{what} does not say which tensor it {role}", hint)
    if found := site_of(hook):
        return found
    why = next((words for pattern, words in _NO_SITE if pattern.search(hook)), None)
    if why is None:
        raise ConfigError(f"{what} {role} `{hook}`, which demur does not know", hint)
    raise ConfigError(
        f"{what} {role} `{hook}`: {why}",
        "demur reads resid_pre, attn_out, mlp_in, mlp_out and resid_post of a block: say with "
        "`site=` which of these it is, or take a bank of one of them",
    )


# SAELens -------------------------------------------------------------------------------------

_ACTIVATIONS: Mapping[str, Activation] = {
    "standard": "relu",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
    "gated": "jumprelu",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_REFUSED = {
    "temporal": "it reads earlier tokens, so a token alone has no activations",
    "matching_pursuit": "its activations come from a search, not from an encoder",
    "abstopk": "its activations can be negative",
}
_NORMALISE: Mapping[str, Normalise] = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
}


@formats.register("saelens")
@dataclass(frozen=True, slots=True)
class SaeLensFolder:
    """A folder of SAELens: `cfg.json` and `sae_weights.safetensors`.

    Architectures: standard, jumprelu, topk, batchtopk and its matryoshka variant, gated (which is a
    jumprelu with thresholds of its own), and transcoders of tensors that demur has sites for. The
    skip connection of a transcoder is not read: it does not depend on latents, so no edit of
    latents moves what it writes.
    """

    def fits(self, path: Path) -> bool:
        """Whether both files are there."""
        return (path / _CONFIG).is_file() and (path / "sae_weights.safetensors").is_file()

    def read(self, path: Path, name: str, site: Site | None) -> StoredBank:
        """Read `cfg.json`, and the shapes of the weights."""
        config = _json(path / _CONFIG)
        told = config.get("metadata")
        if isinstance(told, Mapping) and "seal" in told:  # Ours.
            weights = file_digests(path, of=(_SAE_WEIGHTS,)).get(_SAE_WEIGHTS, "")
            if told["seal"] != bank_seal(config, weights):
                raise StoreError(
                    f"{_CONFIG} or {_SAE_WEIGHTS} in {path} was changed after it was written",
                    "get the folder again, or train the bank again",
                )
        arrays = SafetensorsFile(path / _SAE_WEIGHTS)
        scaler = path / "activation_scaler.json"
        factor = _json(scaler).get("scaling_factor") if scaler.is_file() else None
        return _saelens(config, arrays, str(path), name, site, factor=factor)


def bank_seal(config: Mapping[str, Any], weights: str) -> str:
    """Digest over a configuration of ours and the digest of the weights that go with it."""
    told = {key: value for key, value in config["metadata"].items() if key != "seal"}
    return str(sealed({**config, "metadata": told, "weights": weights})["blake2b"])


def _saelens(
    config: Mapping[str, Any],
    arrays: Arrays,
    spec: str,
    name: str,
    site: Site | None,
    *,
    factor: float | None = None,
) -> StoredBank:
    told = dict(config.get("metadata") or {})
    version = str(told.get("sae_lens_version") or config.get("sae_lens_version") or "")
    old = version[:1].isdigit() and int(version.split(".", maxsplit=1)[0]) < 6
    if old or "hook_point" in config or ("hook_name" in config and "metadata" not in config):
        config, told = _before_six(config, spec), {**config, **told}
    architecture = str(_need(config, "architecture", spec))
    if architecture not in _ACTIVATIONS:
        why = _REFUSED.get(architecture, "demur does not know this architecture")
        raise ConfigError(
            f"{spec} is of architecture `{architecture}`: {why}",
            f"take one of: {', '.join(_ACTIVATIONS)}",
        )
    transcoder = architecture.endswith("transcoder")
    d_model, width = int(_need(config, "d_in", spec)), int(_need(config, "d_sae", spec))
    reshape = _maybe(config, "reshape_activations", spec, default="none")
    if reshape not in (None, "none"):
        raise ConfigError(
            f"{spec} reshapes its input (`{reshape}`): it reads the heads before they are mixed",
            "demur has no site there; take a bank of resid_pre, attn_out, mlp_out or resid_post",
        )
    hook = told.get("hook_name") or told.get("hook_point")
    # Our own banks name their site as it is.
    own = Site.parse(str(told["site"])) if told.get("site") else None
    reads = _site(hook, site or own, spec)
    writes = _written(config, told, reads, spec) if transcoder else reads
    normalise, scale = _normalised(config, told, spec, factor, transcoder=transcoder)
    shapes = arrays.shapes()
    _expect(shapes, spec, {"W_enc": (d_model, width), "W_dec": (width, d_model)})
    _refuse_finetuned(arrays, shapes, spec)
    bias = "b_mag" if architecture == "gated" else "b_enc"
    _expect(shapes, spec, {bias: (width,), "b_dec": (d_model,)})
    own_norms = architecture in ("topk", "batchtopk", "matryoshka_batchtopk")
    skip = "skip" in architecture
    notes: list[str] = []
    if skip:
        notes.append("the skip connection is left out: edits of latents do not move it")
    return StoredBank(
        name=name,
        site=reads,
        writes=writes,
        arrays=arrays,
        encoder=Matrix("W_enc", 1),
        decoder=Matrix("W_dec", 0),
        width=width,
        d_model=d_model,
        activation=_ACTIVATIONS[architecture],
        bias=bias,
        offset="b_dec",
        threshold=_threshold(architecture, arrays, shapes, width, spec=spec, notes=notes),
        k=int(_need(config, "k", spec)) if architecture == "topk" else None,
        centred=False if transcoder else _flag(config, "apply_b_dec_to_input", spec),
        normalise=normalise,
        largest_norm=_number(told.get("largest_norm")),
        factor=scale,
        by_norm=own_norms
        and bool(_maybe(config, "rescale_acts_by_decoder_norm", spec, default=False)),
        gate=("b_gate", "r_mag") if architecture == "gated" else None,
        about=_about("saelens", spec, hook, told, notes, skip=skip),
    )


def _written(config: Mapping[str, Any], told: Mapping[str, Any], reads: Site, spec: str) -> Site:
    """Where a transcoder writes to."""
    d_in, d_out = int(config["d_in"]), int(_need(config, "d_out", spec))
    if d_out != d_in:
        raise ConfigError(
            f"{spec} reads {d_in} numbers and writes {d_out}",
            "a bank reads and writes the residual stream of one model",
        )
    hook = told.get("hook_name_out")
    return _site(hook, None, spec, role="writes") if hook else Site(reads.layer, "mlp_out")


def _normalised(
    config: Mapping[str, Any],
    told: Mapping[str, Any],
    spec: str,
    factor: float | None,
    *,
    transcoder: bool,
) -> tuple[Normalise, float]:
    """What is done to a token before encoding, and the constant that it is multiplied by."""
    kind = str(_need(config, "normalize_activations", spec))
    if kind == "expected_average_only_in":
        scale = factor or told.get("norm_scaling_factor") or config.get("norm_scaling_factor")
        if scale:
            return "none", float(scale)
        raise ConfigError(
            f"{spec} multiplies its input by a factor that its files do not hold",
            "SAELens keeps it in `activation_scaler.json` beside a checkpoint, or folds it into "
            "the weights when training ends; write it as `norm_scaling_factor` into cfg.json",
        )
    if kind not in _NORMALISE:
        raise ConfigError(
            f"{spec} normalises its input by `{kind}`, which a bank cannot",
            f"it can be one of: {', '.join(_NORMALISE)}; whitening is folded in when training ends",
        )
    if transcoder and kind != "none":
        raise ConfigError(
            f"{spec} is a transcoder that normalises its input by `{kind}`",
            "what it writes is not scaled back, which a bank cannot express; take one without",
        )
    return _NORMALISE[kind], 1.0


def _threshold(
    architecture: str,
    arrays: Arrays,
    shapes: Mapping[str, tuple[int, ...]],
    width: int,
    *,
    spec: str,
    notes: list[str],
) -> str | float | None:
    """Where thresholds lie, or the one of all latents; None for none, and for a gate's own."""
    if architecture == "gated":
        _expect(shapes, spec, dict.fromkeys(("b_gate", "r_mag"), (width,)))
        return None
    if "batchtopk" in architecture:
        _expect(shapes, spec, {"topk_threshold": ()})
        notes.append(
            "the threshold is a running mean that begins at 0: after a short training it is too "
            "low, so compare L0 with the k of its training"
        )
        return float(vector(arrays, "topk_threshold"))
    if _ACTIVATIONS[architecture] == "jumprelu":
        _expect(shapes, spec, {"threshold": (width,)})
        return "threshold"
    return None


def _before_six(config: Mapping[str, Any], spec: str) -> dict[str, Any]:
    """The configuration of an older SAELens in today's words, with what it took for granted."""
    out = {**config}
    if out.get("activation_fn_str", out.get("activation_fn")) == "topk":
        kwargs = out.get("activation_fn_kwargs") or {}
        out |= {"architecture": "topk"} | ({"k": kwargs["k"]} if "k" in kwargs else {})
    hook = str(out.get("hook_name") or out.get("hook_point") or "")
    normalise = _maybe(config, "normalize_activations", spec, default=None)
    if isinstance(normalise, bool) or normalise is None:
        normalise = "expected_average_only_in" if normalise else "none"
    heads = "hook_z" if "hook_z" in hook else "none"
    return out | {
        "architecture": _maybe(out, "architecture", spec, default="standard"),
        # Before there was a choice it always was.
        "apply_b_dec_to_input": _maybe(config, "apply_b_dec_to_input", spec, default=True),
        "reshape_activations": _maybe(config, "reshape_activations", spec, default=heads),
        "normalize_activations": normalise,
    }


def _refuse_finetuned(arrays: Arrays, shapes: Mapping[str, tuple[int, ...]], spec: str) -> None:
    for key in ("scaling_factor", "finetuning_scaling_factor"):
        if key in shapes and not bool(torch.allclose(vector(arrays, key), torch.tensor(1.0))):
            raise ConfigError(
                f"{spec} scales its activations by `{key}`, which SAELens stopped to support",
                "multiply the rows of W_dec by it, and save the weights without it",
            )


def _release(source: str, site: Site | None, name: str | None) -> StoredBank:
    """A release of SAELens, fetched by it."""
    release, _, own = source.removeprefix(_RELEASE).partition("/")
    if not release or not own:
        raise ConfigError(
            f"`{source}` names no bank of a release",
            "write saelens:RELEASE/SAE_ID, like saelens:gemma-scope-2b-pt-res-canonical/"
            "layer_20/width_16k/canonical",
        )
    try:
        from sae_lens import SAE  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError.needed(extra="sae", module="sae_lens") from error
    try:
        sae, _, _ = SAE.from_pretrained_with_cfg_and_sparsity(release, own, device="cpu")
    except (ValueError, KeyError, OSError) as error:
        raise StoreError(
            f"{source} cannot be loaded: {error}",
            "the list of releases is at decoderesearch.github.io/SAELens; check the network too",
        ) from error
    # The library folds the factor of a release in where it knows it, and says so here.
    config = sae.cfg.to_dict()
    stored = _saelens(config, Held(dict(sae.state_dict())), source, name or own, site)
    return replace(stored, about={**stored.about, "release": release, "sae_id": own})


# Gemma Scope ---------------------------------------------------------------------------------


@formats.register("gemma-scope")
@dataclass(frozen=True, slots=True)
class GemmaScopeFile:
    """`params.npz` of Gemma Scope, and `params.safetensors` of Gemma Scope 2.

    The files do not name the tensor: it is told from a `config.json` beside them, or from the path
    as the Hub has it (`gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71/params.npz`).
    """

    def fits(self, path: Path) -> bool:
        """Whether the file has the name, or lies in the folder."""
        return _params(path) is not None

    def read(self, path: Path, name: str, site: Site | None) -> StoredBank:
        """Read the shapes of the weights."""
        file = _params(path)
        assert file is not None
        spec = str(path)
        arrays: Arrays = NpzFile(file) if file.suffix == ".npz" else SafetensorsFile(file)
        shapes = arrays.shapes()
        names = {one.lower(): one for one in shapes}
        lower = {key: shapes[one] for key, one in names.items()}
        _expect(lower, spec, dict.fromkeys(("w_enc", "w_dec", "b_enc", "b_dec", "threshold")))
        d_model, width = lower["w_enc"]
        _expect(
            lower,
            spec,
            {
                "w_dec": (width, d_model),
                "b_enc": (width,),
                "b_dec": (d_model,),
                "threshold": (width,),
            },
        )
        config = _json(file.with_name("config.json")) if _beside(file) else {}
        hook = config.get("hf_hook_point_in") or _gemma_hook(file)
        reads = _site(hook, site, spec)
        behind = config.get("hf_hook_point_out")
        writes = reads
        if behind:
            writes = _site(behind, None, spec, role="writes")
        elif "transcoder" in str(file.resolve()):
            writes = Site(reads.layer, "mlp_out")
        skip = "affine_skip_connection" in lower
        return StoredBank(
            name=name,
            site=reads,
            writes=writes,
            arrays=arrays,
            encoder=Matrix(names["w_enc"], 1),
            decoder=Matrix(names["w_dec"], 0),
            width=width,
            d_model=d_model,
            activation="jumprelu",
            bias=names["b_enc"],
            offset=names["b_dec"],
            threshold=names["threshold"],
            about=_about("gemma-scope", spec, hook, config, [], skip=skip),
        )


def _beside(file: Path) -> bool:
    return file.with_name("config.json").is_file()


def _params(path: Path) -> Path | None:
    names = ("params.npz", "params.safetensors")
    if path.is_file():
        return path if path.name in names or path.suffix == ".npz" else None
    return next((path / one for one in names if (path / one).is_file()), None)


def _gemma_hook(file: Path) -> str | None:
    """The hook name that a path on the Hub stands for; None where it leaves it open."""
    path = file.resolve().as_posix()
    layer = re.search(r"layer_(\d+)", path)
    if layer is None:
        return None
    kinds = (
        (r"transcoder", "ln2.hook_normalized"),
        (r"gemma-scope-[^/]*-att\b|attn_out", "attn.hook_z"),
        (r"gemma-scope-[^/]*-mlp\b|mlp_out", "hook_mlp_out"),
        (r"gemma-scope-[^/]*-res\b|resid_post", "hook_resid_post"),
    )
    found = next((kind for pattern, kind in kinds if re.search(pattern, path)), None)
    return None if found is None else f"blocks.{layer[1]}.{found}"


# sparsify ------------------------------------------------------------------------------------


@formats.register("sparsify")
@dataclass(frozen=True, slots=True)
class SparsifyFolder:
    """A hookpoint's folder of EleutherAI/sparsify: `cfg.json` and `sae.safetensors`.

    The folder's name is the hookpoint: `layers.5` is what block 5 gives, `layers.5.mlp` what its
    MLP does.
    """

    def fits(self, path: Path) -> bool:
        """Whether both files are there."""
        return (path / _CONFIG).is_file() and (path / "sae.safetensors").is_file()

    def read(self, path: Path, name: str, site: Site | None) -> StoredBank:
        """Read `cfg.json`, and the shapes of the weights."""
        spec = str(path)
        config = _json(path / _CONFIG)
        k = int(_need(config, "k", spec))
        d_model = int(_need(config, "d_in", spec))
        width = int(config.get("num_latents") or 0)
        if not width:  # 0 is the default, and means this.
            width = d_model * int(_need(config, "expansion_factor", spec))
        if (kind := config.get("activation", "topk")) != "topk":
            raise ConfigError(
                f"{spec} activates its latents by `{kind}`", "a bank can do `topk` only"
            )
        for key in ("signed", "gram_lookup", "embed_skip"):
            if config.get(key):
                raise ConfigError(
                    f"{spec} is made with `{key}`, which a bank cannot express",
                    "take a checkpoint without it",
                )
        arrays = SafetensorsFile(path / "sae.safetensors")
        shapes = arrays.shapes()
        encoder = "W_enc" if "W_enc" in shapes else "encoder.weight"
        decoder = "W_dec" if "W_dec" in shapes else "decoder.weight"
        bias = "b_enc" if "b_enc" in shapes else "encoder.bias"
        _expect(
            shapes,
            spec,
            {
                encoder: (width, d_model),
                decoder: (width, d_model),
                bias: (width,),
                "b_dec": (d_model,),
            },
        )
        transcodes, hook = bool(config.get("transcode")), path.resolve().name
        found = site_of(hook)
        if transcodes and site is None and found is not None and found.kind == "mlp_out":
            site = Site(found.layer, "mlp_in")  # What the module reads, and not what it writes.
        if transcodes and site is None:
            raise ConfigError(
                f"{spec} is a transcoder: it reads what the module `{hook}` reads",
                "say which tensor that is with `site=`, if demur has a site there",
            )
        reads = _site(hook, site, spec)
        skip = bool(config.get("skip_connection"))
        return StoredBank(
            name=name,
            site=reads,
            writes=found if transcodes and found is not None else reads,
            arrays=arrays,
            encoder=Matrix(encoder, 0),
            decoder=Matrix(decoder, 0),
            width=width,
            d_model=d_model,
            activation="topk",
            bias=bias,
            offset="b_dec",
            k=k,
            centred=not transcodes,
            about=_about("sparsify", spec, hook, config, [], skip=skip),
        )


# dictionary_learning -------------------------------------------------------------------------

_LEARNT = re.compile(r"(resid_pre|resid_post|attn_out|attention_out|mlp_out)_layer_(\d+)")


@formats.register("dictionary-learning")
@dataclass(frozen=True, slots=True)
class DictionaryFolder:
    """A trainer's folder of saprmarks/dictionary_learning: `ae.pt` and `config.json`.

    Activations are in the units of the file; that library's own loader of `AutoEncoder` scales
    decoder rows to length 1, and activations with them.
    """

    def fits(self, path: Path) -> bool:
        """Whether both files are there."""
        return (path / "ae.pt").is_file() and (path / "config.json").is_file()

    def read(self, path: Path, name: str, site: Site | None) -> StoredBank:
        """Read `config.json`, and the shapes of the weights."""
        spec = str(path)
        trainer = _need(_json(path / "config.json"), "trainer", spec)
        kind = str(_need(trainer, "dict_class", spec))
        arrays = TorchFile(path / "ae.pt")
        shapes = arrays.shapes()
        raw = "W_enc" in shapes
        encoder = Matrix("W_enc", 1) if raw else Matrix("encoder.weight", 0)
        decoder = Matrix("W_dec", 0) if raw else Matrix("decoder.weight", 1)
        _expect(shapes, spec, {encoder.name: None})
        width = shapes[encoder.name][encoder.latents]
        d_model = shapes[encoder.name][1 - encoder.latents]
        bias, offset = ("b_enc" if raw else "encoder.bias"), "b_dec"
        activation: Activation = "relu"
        threshold: str | float | None = None
        k, gate, centred = None, None, True
        if kind == "AutoEncoder":
            offset = "bias"
        elif kind == "AutoEncoderNew":
            offset, centred = "decoder.bias", False
        elif kind == "AutoEncoderTopK":
            activation = "topk"
            _expect(shapes, spec, {"k": ()})
            k = int(vector(arrays, "k"))
        elif kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
            activation = "jumprelu"
            _expect(shapes, spec, {"threshold": ()})
            threshold = float(vector(arrays, "threshold"))
            if threshold < 0:
                raise ConfigError(
                    f"{spec} has no threshold: its training ended before one was set",
                    "train it for longer, or set `threshold` in its tensors",
                )
        elif kind == "JumpReluAutoEncoder":
            activation, threshold, centred = "jumprelu", "threshold", False
            _expect(shapes, spec, {"threshold": (width,)})
        elif kind == "GatedAutoEncoder":
            activation, gate = "jumprelu", ("gate_bias", "r_mag")
            bias, offset = "mag_bias", "decoder_bias"
            _expect(shapes, spec, dict.fromkeys(gate, (width,)))
        else:
            raise ConfigError(
                f"{spec} is a `{kind}`, which demur does not know",
                "take an AutoEncoder, AutoEncoderNew, AutoEncoderTopK, BatchTopKSAE, "
                "MatryoshkaBatchTopKSAE, JumpReluAutoEncoder or GatedAutoEncoder",
            )
        turned = (width, d_model) if decoder.latents == 0 else (d_model, width)
        _expect(shapes, spec, {decoder.name: turned, bias: (width,), offset: (d_model,)})
        hook = str(trainer.get("submodule_name") or "") or None
        return StoredBank(
            name=name,
            site=_site(_learnt_hook(hook), site, spec),
            writes=_site(_learnt_hook(hook), site, spec),
            arrays=arrays,
            encoder=encoder,
            decoder=decoder,
            width=width,
            d_model=d_model,
            activation=activation,
            bias=bias,
            offset=offset,
            threshold=threshold,
            k=k,
            centred=centred,
            gate=gate,
            about=_about(
                "dictionary-learning",
                spec,
                hook,
                {**trainer, "model_name": trainer.get("lm_name")},
                [],
            ),
        )


def _learnt_hook(hook: str | None) -> str | None:
    """`resid_post_layer_8` as a hook name of TransformerLens."""
    if hook is None or not (found := _LEARNT.fullmatch(hook)):
        return hook
    return f"blocks.{found[2]}.hook_{found[1].replace('attention_out', 'attn_out')}"


# What all formats need -----------------------------------------------------------------------


def _json(path: Path) -> dict[str, Any]:
    try:
        found = strict_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {error}", "fetch it again") from error
    if not isinstance(found, dict):
        raise StoreError(f"{path} holds no object", "fetch it again")
    return found


def _need(config: Mapping[str, Any], key: str, spec: str) -> Any:
    """A setting that numbers hang on."""
    if config.get(key) is not None:
        return config[key]
    near = get_close_matches(key, [one for one in config if one != key], n=1, cutoff=0.75)
    raise StoreError(
        f"the configuration of {spec} has no `{key}`",
        f"is `{near[0]}` a slip of the pen?"
        if near
        else "numbers hang on it, so none is taken for granted: write it into the file",
    )


def _maybe(config: Mapping[str, Any], key: str, spec: str, *, default: Any) -> Any:
    """A setting that was not there from the start, and is not misspelt either."""
    if key in config:
        return config[key]
    near = get_close_matches(key, list(config), n=1, cutoff=0.85)
    if near:
        raise StoreError(
            f"the configuration of {spec} has no `{key}`", f"is `{near[0]}` a slip of the pen?"
        )
    return default


def _flag(config: Mapping[str, Any], key: str, spec: str) -> bool:
    value = _need(config, key, spec)
    if not isinstance(value, bool):
        raise StoreError(f"`{key}` of {spec} is {value!r}", "write true or false")
    return value


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _expect(
    shapes: Mapping[str, tuple[int, ...]],
    spec: str,
    wanted: Mapping[str, tuple[int, ...] | None],
) -> None:
    """See that arrays are there, and of the shapes that the configuration promises."""
    for name, shape in wanted.items():
        if name not in shapes:
            raise StoreError(
                f"{spec} has no array `{name}`", f"it has: {', '.join(sorted(shapes)) or 'none'}"
            )
        if shape is not None and shapes[name] != shape:
            raise StoreError(
                f"`{name}` of {spec} is of shape {shapes[name]}, not {shape}",
                "the weights do not fit the configuration; fetch both again",
            )


def _about(
    kind: str,
    spec: str,
    hook: str | None,
    told: Mapping[str, Any],
    notes: list[str],
    *,
    skip: bool = False,
) -> dict[str, Any]:
    """Where a bank comes from, as plain values."""
    plain = {
        key: value for key, value in told.items() if isinstance(value, str | int | float | bool)
    }
    return {
        "format": kind,
        "spec": spec,
        "hook": hook,
        "model": told.get("model_name") or told.get("model"),
        "fingerprint": told.get("model_fingerprint") or told.get("fingerprint"),
        "neuronpedia": told.get("neuronpedia_id"),
        "l0": _number(told.get("l0")) if isinstance(told.get("l0"), int | float) else None,
        "skip": skip,
        "notes": tuple(notes),
        "told": plain,
    }


# A bank and a model --------------------------------------------------------------------------

_CHAT = re.compile(r"(?:^|[-_./])(?:it|instruct|chat)(?:$|[-_./])", re.IGNORECASE)


def fits(bank: Bank | StoredBank, model: Model, *, strict: bool = False) -> tuple[str, ...]:
    """Check that a bank can be used on a model.

    Args:
        bank: The bank.
        model: The model.
        strict: Whether a bank that was trained on other weights is an error.

    Returns:
        What a reader should know: other weights, a bank of a base model on a chat model.

    Raises:
        ConfigError: Widths differ, the model has no such layer, or the hook is another tensor in
            this family; or, if `strict`, the fingerprints differ.
    """
    if bank.d_model != model.d_model:
        raise ConfigError(
            f"{bank.name} is {bank.d_model} wide, {model.name} {model.d_model}",
            "take a bank that was trained on this model",
        )
    for site in {bank.site, bank.writes or bank.site}:
        if not 0 <= site.layer < model.n_layers:
            raise ConfigError(
                f"{bank.name} is for {site}, {model.name} has blocks 0 to {model.n_layers - 1}",
                "take a bank that was trained on this model, or another `site=`",
            )
    notes = list(bank.about.get("notes", ()))
    _check_module(bank, model)
    told, own = bank.about.get("fingerprint"), ""
    if told:
        own = model.fingerprint
    if told and not model.is_called(str(told)):
        told = str(told)[:8]
        fact = f"{bank.name} was trained on other weights ({told}) than {model.name} ({own[:8]})"
        hint = "its adapter, data type or template may differ; see how well it reconstructs"
        if strict:
            raise ConfigError(fact, hint)
        notes.append(f"{fact}: {hint}")
    name = bank.about.get("model")
    if name and not told:
        base, chat = (bool(_CHAT.search(str(one))) for one in (name, model.name))
        if chat and not base:
            notes.append(
                f"{bank.name} was trained on {name}, which looks like a base model: see how well "
                f"it reconstructs the template's tokens of {model.name}"
            )
        elif not chat and base:
            notes.append(f"{bank.name} was trained on {name}, which looks like a chat model")
    return tuple(notes)


def _check_module(bank: Bank | StoredBank, model: Model) -> None:
    """A module's output is a site where no norm stands behind it, else the norm's is."""
    hook = bank.about.get("hook")
    found = _MODULE.fullmatch(str(hook)) if hook and not _LENS.fullmatch(str(hook)) else None
    inner = (found[2] or "").removesuffix(".output") if found else ""
    kind = _MODULES.get(inner)
    if kind not in ("attn_out", "mlp_out") or site_of(str(hook)) != bank.site:
        return
    own = model.family.attn_out if kind == "attn_out" else model.family.mlp_out
    if own.endswith("layernorm") != inner.endswith("layernorm"):
        raise ConfigError(
            f"{bank.name} is of `{hook}`, and what {model.family.name} adds to the stream is "
            f"`{own}`",
            "the two differ by a norm; take a bank of the latter",
        )
