"""`DEQModel`, which loads any model of the zoo."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from transformers import PreTrainedModel

from deqzoo.errors import UserError, one_line
from deqzoo.models.names import CLASSES, FAMILIES, FAMILY_CLASSES, family_class, load_class
from deqzoo.models.registration import register_heads
from deqzoo.sealed import CHECKSUMS, require_weights_as_sealed
from deqzoo.zoo import (
    ORGANISATION,
    bare_name,
    list_models,
    read_json,
    resolve_folder,
    suggestion,
)

logger = logging.getLogger(__name__)

_HUB_TIMEOUT_SECONDS = 3


def add_family(name: str, classes: Mapping[str, str]) -> None:
    """Make a family of your own known to `DEQModel`, recipes, evaluation, cards and Auto classes.

    Args:
        name: the model type of its configuration.
        classes: class name -> module. The names end as those of other families do: Config, Model,
            ForImageClassification, ..., ImageProcessor.
    """
    FAMILY_CLASSES[name] = dict(classes)
    CLASSES.update(classes)
    transformers.AutoConfig.register(name, family_class(name, "Config"), exist_ok=True)
    register_heads(transformers, name)


class DEQModel:
    """Loads any model of the zoo as the class its configuration names.

    >>> from deqzoo import DEQModel
    >>> model = DEQModel.from_pretrained("mdeq-tiny-cifar-upg")  # doctest: +SKIP
    """

    def __init__(self) -> None:
        raise TypeError("DEQModel is not a model itself; use DEQModel.from_pretrained(name)")

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
        **kwargs: Any,
    ) -> PreTrainedModel:
        """The model stored under a name, in evaluation mode.

        Args:
            name: a local folder; else a zoo name (`deqzoo/NAME` or bare) among the bundled
                checkpoints; else a repository of the Hub.
            revision: branch, tag or commit on the Hub, which is asked for bundled names, too, where
                it is not "main"; the next three also concern the Hub only.
            cache_dir: where downloads are kept.
            token: access token, or whether to use the stored one.
            local_files_only: look only into the download cache.
            subfolder: where in the folder or repository the model is.
            kwargs: passed to the `from_pretrained` of the class (`dtype`, `num_labels`, ...).

        Raises:
            UserError: unknown name, unreachable Hub, files that do not make a model, or a keyword
                that its class does not know.
        """
        hub = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
            "subfolder": subfolder,
        }
        folder = (
            _subfolder(name, subfolder, revision) if subfolder else resolve_folder(name, revision)
        )
        if folder is not None:
            return _load(_class_of(folder / "config.json"), str(folder), kwargs)
        repository = str(name) if "/" in str(name) else f"{ORGANISATION}/{name}"
        config_file = _fetch_config(str(name), repository, hub)
        model = _load(_class_of(config_file), repository, kwargs | hub)
        _check_download(repository, config_file.parent, hub)
        return model


def _subfolder(name: str | os.PathLike[str], subfolder: str, revision: str | None) -> Path | None:
    """As `resolve_folder`, of a model that is not at the top of a folder."""
    path = Path(name).expanduser()
    if not path.is_dir():
        bundled_folder = resolve_folder(name, revision)  # None: the Hub may have it
        if bundled_folder is None:
            return None
        path = bundled_folder
    if not (path / subfolder).is_dir():
        raise UserError(f"folder {path} has no subfolder {subfolder}")
    return resolve_folder(path / subfolder)


def _fetch_config(name: str, repository: str, hub: dict[str, Any]) -> Path:
    """Path of config.json from the Hub or its cache; every failure is one line.

    An unreachable Hub turns `hub["local_files_only"]` on: downloads repeat a failed request for
    about half a minute, this asks once.
    """
    try:
        if not hub["local_files_only"]:
            hub["local_files_only"] = not _hub_answers(repository, hub)
        return Path(hf_hub_download(repository, "config.json", **hub))
    except HFValidationError:
        reason = "it is no folder here and no valid repository name"
    except GatedRepoError:
        reason = f"access to {repository} on the Hub is restricted: log in, or pass a token"
    except RepositoryNotFoundError:
        reason = f"the Hub has no repository {repository}, or it is private and needs a token"
    except RevisionNotFoundError:
        reason = f"{repository} on the Hub has no revision {hub['revision']!r}"
    except LocalEntryNotFoundError:
        reason = f"the Hub cannot be reached or is switched off, and {repository} is not cached"
    except EntryNotFoundError:
        reason = f"{repository} on the Hub has no config.json"
    except HfHubHTTPError as error:
        reason = f"the Hub answered: {one_line(error)}"
    if bare_name(name) in list_models():
        request = f"{name!r} of revision {hub['revision']!r}"
        raise UserError(f"{request}: {reason}; the bundled one loads without revision")
    raise UserError(f"unknown model {name!r}: {suggestion(name)} ({reason})")


def _check_download(repository: str, folder: Path, hub: dict[str, Any]) -> None:
    """Compare downloaded weights with the repository's checksums, where it has any.

    Raises:
        UserError: they differ.
    """
    try:
        hf_hub_download(repository, CHECKSUMS, **hub)
    except EntryNotFoundError:
        return
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"cannot fetch {CHECKSUMS} of {repository}: {one_line(error)}") from error
    require_weights_as_sealed(folder)


def _hub_answers(repository: str, hub: dict[str, Any]) -> bool:
    """Ask the Hub once for a repository; False where there is no connection.

    Raises:
        HfHubHTTPError: the Hub answered, but not with this repository.
    """
    try:
        HfApi().model_info(
            repository, revision=hub["revision"], token=hub["token"], timeout=_HUB_TIMEOUT_SECONDS
        )
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception as error:  # the HTTP library's own errors differ between releases of the Hub
        logger.debug("no connection to the Hub: %s", one_line(error))
        return False
    return True


def _class_of(config_file: Path) -> type[PreTrainedModel]:
    """The class that `architectures` names, or the family's base class where it names none."""
    config = read_json(config_file)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"{config_file} is of model type {model_type!r}; DEQModel loads {', '.join(FAMILIES)}"
        )
    classes = FAMILY_CLASSES[model_type]
    models = [name for name in classes if not name.endswith(("Config", "Processor"))]
    base = next((name for name in models if name.endswith("Model")), models[0])
    architectures = config.get("architectures") or [base]
    architectures = architectures if isinstance(architectures, list) else [architectures]
    for name in architectures:
        if name in models:
            return load_class(name)
    raise UserError(
        f"{config_file} names the architectures {', '.join(map(str, architectures))}; "
        f"those of model type {model_type!r} are {', '.join(models)}"
    )


def _load(model_class: type[PreTrainedModel], source: str, kwargs: dict[str, Any]) -> Any:
    """`from_pretrained` with its failures in one line, and no weight left to chance."""
    wants_info = kwargs.pop("output_loading_info", False)
    try:
        load: Any = model_class.from_pretrained
        model, info = load(source, output_loading_info=True, **kwargs)
    except SafetensorError as error:
        raise UserError(
            f"the weights of {source} are damaged ({one_line(error)}); fetch them again"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"a JSON file of {source} is damaged ({one_line(error)})") from error
    except UserError:
        raise
    except Exception as error:  # damaged configurations fail in arbitrary ways
        if "ignore_mismatched_sizes" in str(error):  # the tensors are in a report that it logged
            raise UserError(
                f"weights of {source} have other sizes than this configuration asks for; pass "
                "ignore_mismatched_sizes=True to start those anew, as after another num_labels"
            ) from error
        raise UserError(f"cannot load {source}: {one_line(error)}") from error
    if info["missing_keys"]:
        missing_tensors = sorted(info["missing_keys"])
        raise UserError(
            f"the weights of {source} lack {len(missing_tensors)} of the tensors of "
            f"{model_class.__name__}, e.g. {', '.join(missing_tensors[:3])}"
        )
    return (model, info) if wants_info else model


__all__ = ["CLASSES", "DEQModel", "FAMILIES", "add_family", "load_class"]
