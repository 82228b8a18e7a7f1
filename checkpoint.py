"""The one door for weights and training states: no other file calls torch.load or torch.save.

Files that we write hold tensors and plain values only: torch.load(weights_only=True) opens them as they are.
"""

import argparse
import pathlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from utils import UserError, atomic_write

# What published training checkpoints hold beside tensors. Allowed only while a file is being read.
PUBLISHED_TYPES = [argparse.Namespace, pathlib.PosixPath]
WRAPPERS = ("model", "state_dict", "model_state")  # keys under which files keep the weights
PREFIXES = ("module.",)  # in front of every name, from a wrapped model


def save(path: Path, payload: dict) -> None:
    """Write a checkpoint: at every moment the file is the old one or the new one, whole."""
    atomic_write(path, lambda file: torch.save(payload, file))


def load(source: str) -> dict:
    """Read a checkpoint or bare weights, from a file or an https address, onto the CPU. Nothing in the file can run."""
    if source.startswith("https://"):
        try:
            with torch.serialization.safe_globals(PUBLISHED_TYPES):
                return torch.hub.load_state_dict_from_url(source, map_location="cpu", check_hash=True, weights_only=True)
        except Exception as error:  # of the network, the hash or the file
            raise UserError(f"no checkpoint from there ({source}): {(str(error).splitlines() or [type(error).__name__])[0][:120]}") from error
    path = Path(source)
    if not path.is_file():
        raise UserError(f"no such file ({path}): expected a checkpoint")
    try:
        if zipfile.is_zipfile(path):  # torch does not look at the checksums that its files carry
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise UserError(f"a damaged checkpoint ({path}): the checksum of {damaged} is wrong, take another copy")
        with torch.serialization.safe_globals(PUBLISHED_TYPES):
            payload = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a bad file ends in one of many types of error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"not a readable checkpoint ({path}): {reason[:120]}") from error
    if not isinstance(payload, Mapping):
        raise UserError(f"not a checkpoint ({path}): it holds a {type(payload).__name__}, expected a dictionary")
    return dict(payload)


def weights(payload: Mapping, *, source: str, key: str | None = None) -> dict[str, Tensor]:
    """The weights by name in what `load` gave. key: where they must be ("model_ema"), else wherever files keep them."""
    if key is not None:
        if key not in payload:
            raise UserError(f"no averaged weights ({source}): it was trained without --model-ema")
        payload = payload[key]
    else:
        payload = next((payload[name] for name in WRAPPERS if isinstance(payload.get(name), Mapping)), payload)
    state = {name: value for name, value in payload.items() if isinstance(value, Tensor)}
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    if not state:
        raise UserError(f"no weights ({source}): expected tensors by name")
    return state


def load_into(model: nn.Module, state: Mapping[str, Tensor], *, source: str, may_lack: tuple[str, ...] = (), may_have: tuple[str, ...] = ()) -> None:
    """Copy weights into a model. Every difference that `may_lack` and `may_have` do not name (how its name begins) raises, with both sides."""
    own = model.state_dict()
    lacking = [name for name in own if name not in state and not name.startswith(may_lack)]
    strange = [name for name in state if name not in own and not name.startswith(may_have)]
    other = [name for name in own if name in state and own[name].shape != state[name].shape]
    if lacking or strange or other:
        kinds = {"missing": lacking, "unknown": strange, "of another shape": other}
        parts = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in kinds.items() if names]
        raise UserError(f"the weights do not fit the model ({source}): {'; '.join(parts)}: is --model the one they were trained as?")
    model.load_state_dict(dict(state), strict=not (may_lack or may_have))
