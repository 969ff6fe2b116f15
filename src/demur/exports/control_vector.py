"""llama.cpp: a GGUF file with a tensor `direction.N`, added at the output of block N.

llama.cpp counts blocks from 0 and adds behind block N, at every token, times the scale that it is
started with; `direction.0` does not exist. So what demur adds at the input of block l is
`direction.(l-1)`, and l is 2 or more. repeng writes and reads the same file.

References:
    llama.cpp, `llama_adapter_cvec::apply` and `common_control_vector_load` (pull request 5970);
    Vogel 2024, repeng.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demur.errors import StoreError
from demur.exports.base import Imported, Job, exporters, of_layers, summed
from demur.exports.files import by_layer
from demur.exports.steering import output_layer
from demur.interventions import Add
from demur.store import strict_json

ARCH, FILE, OWN = "controlvector", "control-vector.gguf", "demur.export"
FIRST = 1


@dataclass(frozen=True, slots=True, eq=False)
class ControlVector:
    """What a GGUF control vector holds.

    Attributes:
        layers: By N, what is added at the output of block N.
        hint: Architecture of the model that it is for; empty if the file does not say.
        about: demur's record; empty in files of other tools.
    """

    layers: dict[int, Tensor]
    hint: str
    about: Mapping[str, Any]


def read_control_vector(path: Path) -> ControlVector:
    """Read llama.cpp's or repeng's file.

    Raises:
        StoreError: It is damaged, a model, or its vectors are quantised.
    """
    from gguf import GGMLQuantizationType, GGUFReader

    plain = {GGMLQuantizationType.F64, GGMLQuantizationType.F32, GGMLQuantizationType.F16}
    try:
        reader = GGUFReader(path)
        fields = {
            key: field.contents() if (field := reader.get_field(key)) is not None else None
            for key in ("general.architecture", f"{ARCH}.model_hint", OWN)
        }
        tensors = [(str(one.name), one.tensor_type, one) for one in reader.tensors]
        about = strict_json(str(fields[OWN])) if fields[OWN] else {}
    except Exception as error:  # The reader indexes into whatever the bytes say.
        raise StoreError(f"{path} is no whole GGUF file: {error}", "get it again") from error
    if fields["general.architecture"] != ARCH:
        raise StoreError(
            f"{path} holds `{fields['general.architecture']}`, no control vector",
            "a model is named with `--model`; a control vector comes from "
            "`ControlVector.export_gguf`",
        )
    layers: dict[int, Tensor] = {}
    for own, kind, tensor in tensors:
        number = own.removeprefix("direction.")
        if number == own or not number.isdecimal():
            raise StoreError(
                f"{path} holds `{own}`, which is no direction of a layer", "get it again"
            )
        if kind not in plain:
            raise StoreError(f"`{own}` of {path} is stored as {kind.name}", "export it as float32")
        layers[int(number)] = torch.tensor(tensor.data.copy())
    return ControlVector(layers, str(fields[f"{ARCH}.model_hint"] or ""), about)


@exporters.register("gguf")
@dataclass(frozen=True, slots=True)
class Gguf:
    """A control vector of llama.cpp."""

    carries: frozenset[type] = frozenset({Add})
    spans: bool = False
    exact: str = "exact for an addition at every token; float32"
    use: str = (
        "```console\n"
        f"$ llama-cli -m MODEL.gguf --control-vector {FILE}\n"
        f"$ llama-cli -m MODEL.gguf --control-vector-scaled {FILE} 0.5\n"
        "```\n\n"
        "The strength is in the file: a scale of 1 is what was exported. Compare with and without: "
        "some architectures of llama.cpp once ignored control vectors without a word."
    )

    def write(self, job: Job) -> Mapping[str, Any]:
        """Write the file.

        Raises:
            FamilyError: An addition is in front of the output of block 1.
        """
        from gguf import GGUFWriter

        layers = [
            output_layer(act.direction.site, first=FIRST, to="a GGUF control vector")
            for act in job.carried.acts
            if isinstance(act, Add)
        ]
        vectors = summed(job.carried, dict(enumerate(layers)))
        record = {**job.about, "layers": layers}
        writer = GGUFWriter(job.folder / FILE, ARCH)
        writer.add_string(f"{ARCH}.model_hint", str(job.model.hf.config.model_type))
        writer.add_int32(f"{ARCH}.layer_count", len(vectors))
        writer.add_string(OWN, json.dumps(record, allow_nan=False))
        for layer, vector in vectors.items():
            writer.add_tensor(f"direction.{layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return {"layers": layers}

    def fits(self, path: Path) -> bool:
        """Whether it is a GGUF file."""
        return path.is_file() and path.suffix == ".gguf"

    def read(self, path: Path, about: Mapping[str, Any]) -> Imported:
        """Read it; errors are those of `read_control_vector`."""
        file = path / FILE if path.is_dir() else path
        found = read_control_vector(file)
        layers, zero = by_layer(file, found.layers)
        notes = [
            "direction.N is added at the output of block N, counted from 0",
            "the file does not say at which token it was read, nor for which weights and template",
        ]
        if zero:
            notes.append(f"{zero} vectors are zero and left out")
        return of_layers(
            layers,
            about or found.about,
            kind="gguf",
            recipe=f"control vector for a model of type {found.hint or 'unknown'}",
            notes=() if about or found.about else tuple(notes),
        )
