"""What the stand-ins for diffusers' schedulers share: configuration, the place in the trajectory, and the step itself.

A scheduler works out its noise levels as diffusers does, traces its formula once, and then every ``step`` is one kernel.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..engine.compile import compile_trace
from ..engine.noise import Generators, draw_normal, spread_noise
from ..engine.plan import Plan
from ..engine.prediction import Prediction
from ..engine.trace import Trace
from . import config as _config
from .config import Config

Self = TypeVar("Self", bound="Scheduler")
Timestep = Tensor | float
_NO_OPTIONS: Mapping[str, Any] = {}


class SchedulerOutput:
    """What `step` returns: ``prev_sample``, and a second value (``pred_original_sample``) worked out when it is asked for.

    It is also the tuple of the two, for ``return_dict=False``.
    """

    __slots__ = ("_given", "_second", "_second_name", "prev_sample")

    def __init__(
        self,
        prev_sample: Tensor,
        second_name: str | None = None,
        second: Callable[..., Tensor] | None = None,
        *given: Any,
    ) -> None:
        self.prev_sample = prev_sample
        self._second: Callable[..., Tensor] | Tensor | None = second
        self._second_name, self._given = second_name, given

    def __getattr__(self, name: str) -> Tensor:
        if name == self._second_name and self._second is not None:
            return self._value()
        raise AttributeError(f"the output of this step has no {name!r}")

    def _value(self) -> Tensor:
        if callable(self._second):
            self._second, self._given = self._second(*self._given), ()
        return self._second  # type: ignore[return-value]

    def __getitem__(self, key: str | int | slice) -> Any:
        if key == 0:
            return self.prev_sample
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[Tensor]:
        yield self.prev_sample
        if self._second is not None:
            yield self._value()

    def __len__(self) -> int:
        return 1 + (self._second is not None)

    def to_tuple(self) -> tuple[Tensor, ...]:
        return tuple(self)


class Scheduler(ABC):
    """Base of the stand-ins. Subclasses give ``defaults``, `_set_path` and `_trace`.

    Every argument of the diffusers class of the same name, with its default, is in ``defaults``; an argument that is not
    there is refused by name.
    """

    defaults: ClassVar[dict[str, Any]] = {}
    order: ClassVar[int] = 1
    second_output: str | None = None
    needs_set_timesteps: ClassVar[bool] = True
    stateless: ClassVar[bool] = False  # steps may come in any order, each found by its timestep
    config_name = _config.CONFIG_NAME
    _compatible_names: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters += [inspect.Parameter(name, kind, default=value) for name, value in cls.defaults.items()]
        if cls.defaults:
            cls.__signature__ = inspect.Signature(parameters[1:])  # type: ignore[attr-defined]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        if len(args) > len(self.defaults):
            raise TypeError(f"{name} takes {len(self.defaults)} arguments, got {len(args)}")
        given = dict(zip(self.defaults, args, strict=False))
        twice = sorted(set(given) & set(kwargs))
        unknown = sorted(set(kwargs) - set(self.defaults))
        if twice or unknown:
            what = (
                f"got {twice} twice"
                if twice
                else f"has no argument {unknown}, its arguments are {sorted(self.defaults)}"
            )
            raise TypeError(f"{name} {what}")
        left = [name for name in self.defaults if name not in given and name not in kwargs]
        self.config = Config({**self.defaults, **given, **kwargs, "_use_default_values": left})
        self.num_inference_steps: int | None = None
        self.timesteps: Tensor = torch.empty(0)
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._plans: dict[Any, Plan] = {}
        self._history: dict[Any, Tensor] = {}
        self._setup()

    # ---- what subclasses give ---------------------------------------------------------------------------------------

    @abstractmethod
    def _setup(self) -> None:
        """Work out the schedule from the configuration, and the timesteps before `set_timesteps`."""

    def _prediction(self) -> Prediction:
        """What the model predicts."""
        config = self.config
        thresholding = config.get("thresholding", False)
        clip = config.get("clip_sample_range", 1.0) if config.get("clip_sample") and not thresholding else None
        return Prediction(
            prediction_type=config.get("prediction_type", "epsilon"),
            clip=clip,
            threshold_ratio=config["dynamic_thresholding_ratio"] if thresholding else None,
            sample_max_value=config.get("sample_max_value", 1.0),
        )

    @abstractmethod
    def _trace(self, trace: Trace, start: int, **options: Any) -> None:
        """Follow the solver's formula from step ``start`` on."""

    # ---- configuration ----------------------------------------------------------------------------------------------

    @classmethod
    def from_config(
        cls: type[Self], config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """A scheduler with the arguments of ``config`` that this class has, as diffusers swaps schedulers: those that were left to
        their defaults take the defaults of this class.

        Raises:
            ValueError: a name that no scheduler of this module knows.
        """
        values = {k: v for k, v in dict(config).items() if k not in config.get("_use_default_values", ())} | kwargs
        known = set().union(*(other.defaults for other in _all_subclasses(Scheduler)))
        unknown = sorted(k for k in values if not k.startswith("_") and k not in known)
        if unknown and not return_unused_kwargs:
            raise ValueError(f"{cls.__name__}.from_config does not know {unknown}; it knows {sorted(cls.defaults)}")
        made = cls(**{k: v for k, v in values.items() if k in cls.defaults})
        if return_unused_kwargs:
            return made, {k: v for k, v in kwargs.items() if k not in cls.defaults}
        return made

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the configuration as ``scheduler_config.json``; diffusers reads it too."""
        if push_to_hub:
            raise ValueError("push_to_hub=True: fastgen writes folders only; give the folder to huggingface_hub")
        _config.save(self.config, save_directory, type(self).__name__)

    save_config = save_pretrained

    @classmethod
    def from_pretrained(
        cls: type[Self], pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """Read ``scheduler_config.json`` of a folder, written here or by diffusers."""
        return cls.from_config(_config.load(pretrained_model_name_or_path, subfolder), **kwargs)

    @classmethod
    def load_config(
        cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        return _config.load(pretrained_model_name_or_path, subfolder)

    @property
    def compatibles(self) -> list[type["Scheduler"]]:
        """The classes whose `from_config` takes this scheduler's configuration."""
        names = {type(self).__name__, *self._compatible_names}
        return [cls for cls in _all_subclasses(Scheduler) if cls.__name__ in names]

    def __repr__(self) -> str:
        named = {k: v for k, v in self.config.items() if k in self.defaults}
        changed = {k: v for k, v in named.items() if v is not self.defaults[k] and v != self.defaults[k]}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in changed.items())})"

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])

    # ---- the place in the trajectory --------------------------------------------------------------------------------

    @property
    def step_index(self) -> int | None:
        """The step that comes next; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The step the trajectory begins with, where a pipeline has set it (image to image)."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        self._begin_index = begin_index

    def _restart(self) -> None:
        self._step_index = self._begin_index = None
        self._plans, self._history = {}, {}
        self._last_plan: tuple[int, torch.dtype, torch.device, Mapping[str, Any], Plan] | None = None
        self._values: list[float] = self.timesteps.tolist()  # on the host, so that steps are found without waiting

    def index_for_timestep(self, timestep: Timestep, schedule_timesteps: Tensor | None = None) -> int:
        """Where ``timestep`` stands in the schedule; of two places the second, as steps of order 2 begin there.

        Raises:
            ValueError: it is not in the schedule.
        """
        place = self._place_in_memory(timestep)
        if place is None or schedule_timesteps is not None:
            values = self._values if schedule_timesteps is None else schedule_timesteps.tolist()
            value = timestep.item() if isinstance(timestep, Tensor) else timestep
            places = [i for i, other in enumerate(values) if other == value]
            if not places:
                raise ValueError(
                    f"timestep {value} is not in the schedule of {len(values)} timesteps from {values[0]} to {values[-1]}"
                )
            return places[1 if len(places) > 1 else 0]
        value = self._values[place]
        if place + 1 < len(self._values) and self._values[place + 1] == value:
            return place + 1
        return place

    def _place_in_memory(self, timestep: Timestep) -> int | None:
        """The index of a timestep that is a view into ``timesteps``, without asking the device for its value."""
        if not isinstance(timestep, Tensor) or timestep.device.type == "cpu" or timestep.dim() != 0:
            return None
        mine = self.timesteps
        if timestep.untyped_storage().data_ptr() != mine.untyped_storage().data_ptr():
            return None
        return int(timestep.storage_offset() - mine.storage_offset())

    def _init_step_index(self, timestep: Timestep) -> None:
        self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        self._start = self._step_index
        self._history = {}

    # ---- steps ------------------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: Timestep | None = None, *args: Any) -> Tensor:
        """``sample`` as the model wants to see it; here, as it is."""
        return sample

    def _plan(self, start: int, sample: Tensor, options: Mapping[str, Any]) -> Plan:
        last = self._last_plan
        if (
            last is not None
            and last[0] == start
            and last[1] is sample.dtype
            and last[2] == sample.device
            and last[3] == options
        ):
            return last[4]
        wide = torch.float64 if sample.dtype == torch.float64 else torch.float32
        key = (start, sample.device, wide, tuple(options.items()))
        plan = self._plans.get(key)
        if plan is None:
            trace = Trace(self._prediction(), scale_inputs=False)
            self._trace(trace, start, **options)
            plan = compile_trace(trace, learned_variance=self._learns_variance()).to(sample.device, wide)
            self._plans[key] = plan
        self._last_plan = start, sample.dtype, sample.device, options, plan
        return plan

    def _learns_variance(self) -> bool:
        return False

    def _index(self, timestep: Timestep) -> int:
        """The step that ``timestep`` asks for, checked."""
        if self.needs_set_timesteps and self.num_inference_steps is None:
            raise ValueError(f"{type(self).__name__}: call set_timesteps before step")
        if self.stateless:
            self._start = 0
            return self.index_for_timestep(timestep)
        if self._step_index is None:
            self._init_step_index(timestep)
        index: int = self._step_index  # type: ignore[assignment]
        if index >= len(self._values):
            raise IndexError(
                f"{type(self).__name__}: step was called {index - self._start + 1} times, the trajectory has "
                f"{len(self._values) - self._start} steps; call set_timesteps to begin another"
            )
        return index

    def _advance(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        return_dict: bool,
        options: Mapping[str, Any] = _NO_OPTIONS,
        generator: Generators = None,
        noise: Tensor | None = None,
        noise_dtype: torch.dtype | None = None,
        seeds: Tensor | Sequence[int] | None = None,
    ) -> Any:
        """One step; ``options`` are the arguments of ``step`` that the coefficients depend on."""
        index = self._index(timestep)
        plan = self._plan(self._start, sample, options)
        i = index - self._start
        if not plan.draws_noise[i]:
            noise = seeds = None
        elif noise is None and seeds is None:
            noise = draw_normal(sample.shape, generator, model_output.device, noise_dtype or model_output.dtype)
        elif noise is not None:
            noise = spread_noise(noise, sample)
        following = plan.step(model_output, i, sample, history=self._history, noise=noise, seeds=seeds)
        if following.dtype != model_output.dtype and model_output.dtype != torch.float64:
            following = following.to(model_output.dtype)
        if not self.stateless:
            self._step_index = index + 1
        if self.second_output is None:
            return SchedulerOutput(following) if return_dict else (following,)
        versions = model_output._version, sample._version
        return SchedulerOutput(following, self.second_output, self._later, plan, i, model_output, sample, versions)

    def _later(self, plan: Plan, i: int, model_output: Tensor, sample: Tensor, versions: tuple[int, int]) -> Tensor:
        if (model_output._version, sample._version) != versions:
            raise RuntimeError(
                f"{self.second_output} is worked out when it is asked for, and the model's output or the sample of this step has "
                "been changed in place since: read it right after the step"
            )
        return self._second(plan, i, model_output, sample)

    def _second(self, plan: Plan, i: int, model_output: Tensor, sample: Tensor) -> Tensor:
        """The second value of a step's output."""
        return plan.predicted_sample(model_output, i, sample)

    # ---- noise in the other direction -------------------------------------------------------------------------------

    def _marginals(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of the noised training samples at ``timesteps``, [N] float64 each, on the host."""
        raise ValueError(f"{type(self).__name__} has no training noise of its own: use another scheduler's add_noise")

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x0 + sigma eps at each sample's own timestep.

        Args:
            original_samples, noise: [N, *].
            timesteps: [N], of the schedule.
        """
        alpha, sigma = (m.to(original_samples.dtype) for m in self._marginals(torch.atleast_1d(timesteps)))
        return combine(alpha, original_samples, sigma, noise)


def combine(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """a_n x_n + b_n y_n with a weight a sample, [N] or one for all."""
    shape = (-1, *([1] * (x.dim() - 1)))
    return a.to(x.device).reshape(shape) * x + b.to(x.device).reshape(shape) * y


def _all_subclasses(cls: Any) -> list[type[Scheduler]]:
    found = [sub for child in cls.__subclasses__() for sub in (child, *_all_subclasses(child))]
    return [sub for sub in found if sub.defaults]


def require_float_timestep(cls: type[Scheduler], timestep: Timestep) -> None:
    """Integers are taken for indices by mistake: schedules in sigma have fractional timesteps."""
    if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
        raise ValueError(
            f"{cls.__name__}.step takes one of the scheduler's own timesteps, got the integer {timestep!r}: "
            "not the number of the step"
        )


def to_timesteps(values: np.ndarray, device: Any, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.array(values, order="C")).to(device=device, dtype=dtype)
