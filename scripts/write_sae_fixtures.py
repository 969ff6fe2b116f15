"""Write tiny autoencoders with sae-lens itself, and what it makes of some inputs.

    PYTHON scripts/write_sae_fixtures.py [tests/fixtures/sae]

PYTHON has sae-lens. Each folder gets what sae-lens saves, and `expected.safetensors` with inputs,
activations and reconstructions, the version of sae-lens in its metadata. Draws are fixed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import sae_lens
import torch
from safetensors.torch import save_file

D_IN, D_SAE, TOKENS = 12, 24, 10
NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")


def config(architecture: str, **more: Any) -> dict[str, Any]:
    """A configuration as sae-lens writes them."""
    out: dict[str, Any] = {
        "architecture": architecture,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": "transcoder" not in architecture,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": sae_lens.__version__,
            "model_name": "tiny",
            "hook_name": "blocks.1.hook_resid_post",
        },
    }
    if "transcoder" in architecture:
        out["d_out"] = D_IN
        out["metadata"]["hook_name"] = "blocks.1.hook_resid_pre"
        out["metadata"]["hook_name_out"] = "blocks.1.hook_mlp_out"
    return out | more


def kinds() -> dict[str, dict[str, Any]]:
    """Every configuration that demur reads, by the name of its folder."""
    out = {
        f"{architecture}-{how}": config(architecture, normalize_activations=how)
        for architecture in ("standard", "jumprelu", "gated")
        for how in NORMALISATIONS
    }
    for how in NORMALISATIONS:
        for rescaled in (False, True):
            out[f"topk-{how}{'-rescaled' if rescaled else ''}"] = config(
                "topk", normalize_activations=how, k=5, rescale_acts_by_decoder_norm=rescaled
            )
    for architecture in (
        "transcoder",
        "skip_transcoder",
        "jumprelu_transcoder",
        "jumprelu_skip_transcoder",
    ):
        out[architecture] = config(architecture)
    out["standard-uncentred"] = config("standard", apply_b_dec_to_input=False)
    out["jumprelu-uncentred"] = config("jumprelu", apply_b_dec_to_input=False)
    return out


def drawn(sae: torch.nn.Module, rng: torch.Generator) -> None:
    """Draw every weight, so that no convention hides behind a zero or a unit norm."""
    with torch.no_grad():
        for name, parameter in sorted(sae.named_parameters()):
            value = torch.randn(parameter.shape, generator=rng) * 0.5
            if name == "threshold":
                value = value.abs() + 0.2
            parameter.copy_(value)


def write(folder: Path, sae: Any, x: torch.Tensor, *, saved: Any = None) -> None:
    """Save the bank, the inputs and what comes out of it."""
    folder.mkdir(parents=True, exist_ok=True)
    (saved or sae.save_model)(folder)
    with torch.no_grad():
        f = sae.encode(x)
        y = sae.decode(f)
    save_file(
        {"x": x.contiguous(), "f": f.contiguous(), "y": y.contiguous()},
        folder / "expected.safetensors",
        {"sae_lens": sae_lens.__version__},
    )
    (folder / "cfg.json").write_text(
        json.dumps(json.loads((folder / "cfg.json").read_text()), indent=1) + "\n"
    )


def folded(rng: torch.Generator, x: torch.Tensor, root: Path) -> None:
    """A constant factor of the input, known: beside a checkpoint, as training leaves it."""
    sae = sae_lens.SAE.from_dict(config("standard"))
    drawn(sae, rng)
    folder = root / "standard-expected_average"
    folder.mkdir(parents=True, exist_ok=True)
    sae.cfg.normalize_activations = "expected_average_only_in"
    sae.save_model(folder)
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.37}\n')
    saved = (folder / "cfg.json").read_text()
    sae.fold_activation_norm_scaling_factor(0.37)
    write(folder, sae, x, saved=lambda _: None)
    (folder / "cfg.json").write_text(json.dumps(json.loads(saved), indent=1) + "\n")


def batchtopk(rng: torch.Generator, x: torch.Tensor, root: Path) -> None:
    """A BatchTopK bank as training saves it for use, and as its checkpoints are."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    for rescaled in (False, True):
        own = BatchTopKTrainingSAEConfig(
            d_in=D_IN, d_sae=D_SAE, k=5, rescale_acts_by_decoder_norm=rescaled
        )
        own.metadata.model_name = "tiny"
        own.metadata.hook_name = "blocks.1.hook_resid_post"
        sae = BatchTopKTrainingSAE(own)
        drawn(sae, rng)
        sae.topk_threshold.fill_(1.1)
        name = f"batchtopk{'-rescaled' if rescaled else ''}"
        sae.save_inference_model(root / name)
        loaded = sae_lens.SAE.load_from_disk(root / name)
        write(root / name, loaded, x)
        write(root / f"{name}-checkpoint", loaded, x, saved=sae.save_model)


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/fixtures/sae")
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, D_IN, generator=rng) * 2 + 0.3
    for name, own in kinds().items():
        sae = sae_lens.SAE.from_dict(own) if "transcoder" not in name else None
        if sae is None:
            from sae_lens.registry import get_sae_class

            kind, configuration = get_sae_class(own["architecture"])
            sae = kind(configuration.from_dict(own))
        drawn(sae, rng)
        write(root / name, sae, x)
    folded(rng, x, root)
    batchtopk(rng, x, root)
    total = sum(one.stat().st_size for one in root.rglob("*") if one.is_file())
    print(
        f"{len(list(root.iterdir()))} banks, {total / 1000:.0f} kB, sae-lens {sae_lens.__version__}"
    )


if __name__ == "__main__":
    main()
