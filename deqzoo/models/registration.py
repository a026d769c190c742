"""Makes the families and the zoo's names known to transformers, once it is imported.

`import deqzoo` must stay cheap, and transformers takes seconds: what has to be done to one of its
modules is done right after that module was imported, or at once where it already is.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from deqzoo.models.names import FAMILIES, family_class, load_class
from deqzoo.zoo import bundled_source, read_json, resolve_folder

Action = Callable[[ModuleType], None]
_AUTO = "transformers.models.auto"

#: Suffix of a class -> its Auto class and its pipeline; graph heads have neither.
AUTO_CLASSES: dict[str, tuple[str, str | None]] = {
    "Backbone": ("AutoBackbone", None),
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification"),
    "Model": ("AutoModel", "feature-extraction"),
}


class _AfterImport(MetaPathFinder):
    """Runs an action when a module has been imported."""

    def __init__(self, actions: dict[str, Action]) -> None:
        self.actions = actions

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        action = self.actions.pop(fullname, None)  # popped: the search below comes here again
        if action is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderWithAction(spec.loader, action)
        return spec


class _LoaderWithAction(Loader):
    """A loader that runs an action on the module after it is loaded."""

    def __init__(self, loader: Any, action: Action) -> None:
        self.loader, self.action = loader, action

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.action(module)


def after_import(actions: dict[str, Action]) -> None:
    """Run actions on modules: at once on those that are imported, on the others when they are."""
    pending_actions = {}
    for name, action in actions.items():
        module = sys.modules.get(name)
        if module is None or getattr(module.__spec__, "_initializing", False):
            pending_actions[name] = action
        else:
            action(module)
    if pending_actions:
        sys.meta_path.insert(0, _AfterImport(pending_actions))


_pending_registrations: list[Callable[[], None]] = []


def _register(registration: Callable[[], None]) -> None:
    """Register classes now, or at the first use of an Auto class.

    Later, where one of our own modules imports transformers and is itself not complete yet.
    """
    _pending_registrations.append(registration)
    _settle()


def _settle() -> None:
    is_importing = any(
        getattr(getattr(module, "__spec__", None), "_initializing", False)
        for name, module in list(sys.modules.items())
        if name.startswith("deqzoo.models.") or name == "transformers.modeling_utils"
    )
    while _pending_registrations and not is_importing:
        _pending_registrations.pop(0)()


def install() -> None:
    """Make deqzoo known to transformers."""
    after_import(
        {
            f"{_AUTO}.configuration_auto": _configurations,
            f"{_AUTO}.modeling_auto": _models,
            f"{_AUTO}.image_processing_auto": _image_processors,
            f"{_AUTO}.tokenization_auto": lambda module: _know_names(module.AutoTokenizer),
            # A pipeline tries these, too, and would ask the Hub for files that no model here has.
            f"{_AUTO}.feature_extraction_auto": lambda m: _know_names(m.AutoFeatureExtractor),
            f"{_AUTO}.processing_auto": lambda module: _know_names(module.AutoProcessor),
            f"{_AUTO}.video_processing_auto": lambda m: _know_names(m.AutoVideoProcessor),
            "transformers.pipelines": _pipelines,
        }
    )


def register_heads(module: Any, family: str) -> None:
    """Make the Auto classes of a module of transformers know the models of a family."""
    config = family_class(family, "Config")
    for suffix, (auto, _) in AUTO_CLASSES.items():
        if (kind := family_class(family, suffix)) is not None:
            getattr(module, auto).register(config, kind, exist_ok=True)


def _configurations(module: ModuleType) -> None:
    def register() -> None:
        for family in FAMILIES:
            module.AutoConfig.register(family, family_class(family, "Config"), exist_ok=True)

    _know_names(module.AutoConfig)
    _register(register)


def _models(module: ModuleType) -> None:
    def register() -> None:
        for family in FAMILIES:
            register_heads(module, family)

    # Trainer smooths labels against the next words where it finds the class among these.
    causal = module.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    causal.setdefault("deq_transformer", "DEQTransformerForCausalLM")
    for auto, _ in AUTO_CLASSES.values():
        _know_names(getattr(module, auto))
    _know_folders(module.AutoBackbone)
    _register(register)


def _image_processors(module: ModuleType) -> None:
    def register() -> None:
        module.AutoImageProcessor.register(
            family_class("mdeq", "Config"),
            slow_image_processor_class=load_class("MDEQImageProcessor"),
            exist_ok=True,
        )

    _know_names(module.AutoImageProcessor)
    _register(register)


def _pipelines(module: Any) -> None:
    """`pipeline` asks the Hub about a name before anything loads it; by which function depends on
    the version of transformers (5.17: `cached_file`)."""
    for name in ("resolve_revision", "cached_file", "find_adapter_config_file"):
        if hasattr(module, name):
            setattr(module, name, _with_resolved_name(getattr(module, name)))
    ask_hub = module.get_task

    @functools.wraps(ask_hub)
    def get_task(model: str, *args: Any, **kwargs: Any) -> str:
        return _task_of(model) or ask_hub(model, *args, **kwargs)

    setattr(module, "get_task", get_task)  # noqa: B010 (the module has it only at run time)


def _task_of(model: str) -> str | None:
    """The pipeline of a zoo name or of a folder with one of our models."""
    folder = resolve_folder(model)
    config = {} if folder is None else read_json(folder / "config.json")
    if config.get("model_type") in FAMILIES:
        for name in config.get("architectures") or ():
            for suffix, (_, task) in AUTO_CLASSES.items():
                if name.endswith(suffix):
                    return task
    return None


def _know_folders(auto: Any) -> None:
    """`AutoBackbone` asks the Hub whether there is a repository of a folder's name."""
    ask_hub = auto.from_pretrained.__func__
    load = super(auto.__bases__[0], auto).from_pretrained.__func__  # of the other Auto classes

    @functools.wraps(ask_hub)
    def from_pretrained(cls: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        folder = resolve_folder(source)
        model_type = folder is not None and read_json(folder / "config.json").get("model_type")
        return (load if model_type in FAMILIES else ask_hub)(cls, source, *args, **kwargs)

    auto.from_pretrained = _after_registration(from_pretrained)


def _know_names(auto: Any) -> None:
    """Let an Auto class take the zoo's names, and run the pending registrations."""
    for name in ("from_pretrained", "from_config", "for_model"):
        if hasattr(auto, name):
            setattr(auto, name, _after_registration(getattr(auto, name).__func__))


def _after_registration(function: Callable[..., Any]) -> Any:
    call_with_resolved_name = _with_resolved_name(function, index=1)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        _settle()
        return call_with_resolved_name(*args, **kwargs)

    return classmethod(call)


def _with_resolved_name(function: Callable[..., Any], index: int = 0) -> Callable[..., Any]:
    """A function whose argument `pretrained_model_name_or_path`, by place or by name, may be a zoo
    name."""
    keyword = "pretrained_model_name_or_path"

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        revision = kwargs.get("revision")
        if len(args) > index:
            args = (*args[:index], bundled_source(args[index], revision), *args[index + 1 :])
        elif keyword in kwargs:
            kwargs[keyword] = bundled_source(kwargs[keyword], revision)
        return function(*args, **kwargs)

    return call
