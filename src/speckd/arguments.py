"""The settings of a training run: TRL's names, the method's, and the teacher's, in one flat dataclass."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from trl import SFTConfig

from speckd.config import Options, nearest
from speckd.engine import default_chunk_size
from speckd.errors import ConfigError
from speckd.moving_config import MovingConfig
from speckd.sequence_config import SequenceConfig
from speckd.teachers.placement import existing_device
from speckd.teachers.sharding import SHARDINGS
from speckd.types import SequenceDivergence

#: Where a teacher may live.
TEACHERS = ("model", "cache", "server", "base")
#: What in `teacher_model_init_kwargs` quantises the teacher.
QUANTIZATION = ("quantization_config", "load_in_4bit", "load_in_8bit")
#: Held-out measures of which less is better; of the others more is.
LOWER_IS_BETTER = {"loss", "nll", "kl", "kl_at_least"}


@dataclass
class SpecKDConfig(MovingConfig, SequenceConfig, SFTConfig):
    """`SFTConfig` with the method and the teacher. What is unset behaves as in TRL, but for what is listed here.

    bfloat16 is used where a GPU offers it and nobody said otherwise (TRL: always); non-finite losses are never hidden from the
    log; reports go nowhere unless asked for; the best checkpoint is the one with the lowest held-out NLL.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012  (Transformers' own convention: parsed from JSON on the command line)
        *SFTConfig._VALID_DICT_FIELDS,
        "teacher_model_init_kwargs",
        "teachers",
        "teacher_mixture",
        "gate_options",
        "rejected_options",
        "divergence_options",
        *MovingConfig.MOVING_KEYS,
        "student_text_divergence_options",
    ]

    output_dir: str | None = field(default=None, metadata={"help": "where the student, its card and its log are written"})
    teacher: str = field(
        default="model",
        metadata={
            "help": "where it is: model (in this process), cache (what 'speckd cache' kept), server (vLLM, SGLang), or base: "
            "the student's own base, without its adapter"
        },
    )
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "path or hub id of the teacher"})
    teacher_model_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of the teacher"})
    teacher_model_init_kwargs: Options | None = field(
        default=None,
        metadata={
            "help": "for the teacher's from_pretrained, a mapping or JSON; dtype is bfloat16 with bf16, else the student's"
        },
    )
    teacher_device: str | None = field(
        default=None, metadata={"help": "where the teacher computes, such as cuda:1 or cpu; by default, beside the student"}
    )
    teachers: Options | None = field(
        default=None, metadata={"help": "several teachers in the place of one: a mapping of names to paths or hub ids, or JSON"}
    )
    teacher_route_column: str | None = field(
        default=None, metadata={"help": "the data's column that names, among teachers, each row's own"}
    )
    teacher_mixture: Options | None = field(
        default=None, metadata={"help": "mix the teachers' probabilities: a mapping of their names to weights, or JSON"}
    )
    reference_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "path or hub id of the model that the gates excess_divergence and excess_label_loss need"},
    )
    teacher_sharding: str = field(
        default="none", metadata={"help": "cut the teacher's layers over all processes: none, fsdp2, or zero3 (DeepSpeed)"}
    )
    share_teacher_prompt: bool = field(
        default=True,
        metadata={"help": "the teacher computes a start that several rows share once, where that is cheaper and proved equal"},
    )
    teacher_top_k: int = field(
        default=32, metadata={"help": "of a cached or served teacher: how many of its most probable tokens are kept"}
    )
    teacher_cache_dir: str | None = field(default=None, metadata={"help": "folder of the teacher's cached answers"})
    teacher_cache_kind: str = field(
        default="top_k",
        metadata={"help": "what is cached: top_k, sampled (tokens drawn from the teacher, unbiased) or full (the vocabulary)"},
    )
    teacher_cache_samples: int = field(default=50, metadata={"help": "draws a token where teacher_cache_kind is sampled"})
    teacher_cache_bits: int = field(default=16, metadata={"help": "bits of a cached log-probability: 16 or 32"})
    teacher_cache_compression: str = field(default="none", metadata={"help": "none, or zlib: smaller and slower"})
    teacher_server_urls: list[str] | None = field(
        default=None, metadata={"help": "addresses of the servers that hold the teacher, such as http://127.0.0.1:8000"}
    )
    teacher_server_api: str = field(default="vllm", metadata={"help": "how they are spoken to: vllm or sglang"})
    teacher_server_model: str | None = field(
        default=None, metadata={"help": "the served model's name; by default the only one that is served"}
    )
    teacher_server_concurrency: int = field(default=4, metadata={"help": "requests at a time to one server"})
    teacher_server_tokens: int = field(default=4096, metadata={"help": "tokens in one request, unless a row has more"})
    teacher_server_timeout_s: float = field(default=300.0, metadata={"help": "seconds for one request"})
    teacher_server_patience_s: float = field(
        default=600.0, metadata={"help": "seconds that all servers may be down before the run ends with a checkpoint"}
    )
    teacher_prefetch: int = field(default=2, metadata={"help": "optimizer steps that a served teacher is asked ahead"})
    scrambled_teacher_fraction: float = field(
        default=0.0, metadata={"help": "stress test: share of positions where the teacher is made wrong on purpose"}
    )
    max_dropped_mass: float = field(
        default=1e-3,
        metadata={"help": "refuse a teacher that puts more probability than this on tokens that the student does not have"},
    )
    early_rejection: bool = field(
        default=True,
        metadata={"help": "prove rejections without the teacher's projection, where that pays; changes no verdict"},
    )
    loss_memory_budget: str | None = field(
        default=None,
        metadata={
            "help": "memory for logits, such as 512MiB: so many tokens of student and teacher are held at once; by default "
            "256MiB on a CPU and 2GiB on a GPU"
        },
    )
    loss_chunk_size: int | None = field(
        default=None, metadata={"help": "the tokens themselves, instead of loss_memory_budget; changes no result"}
    )
    gate_seed: int | None = field(default=None, metadata={"help": "seed of the gate's draws; by default, seed"})
    starvation_threshold: float = field(default=0.1, metadata={"help": "warn when the acceptance rate stays below this"})
    starvation_patience: int = field(default=50, metadata={"help": "for so many steps in a row"})
    # Other defaults than TRL's.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "kept off: it would hide non-finite losses"})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "the loss uses every parameter; set it for a model with experts that may stay unused"}
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036  (the order that HfArgumentParser can read)
        default="none", metadata={"help": "none, tensorboard, trackio, wandb, ..."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:  # type: ignore[has-type]
            self.bf16 = bool(
                not self.fp16 and not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            )
        best: str | None = self.metric_for_best_model  # type: ignore[has-type]
        if self.load_best_model_at_end and best is None:
            self.metric_for_best_model = best = "nll"  # not the loss, which a gate that rejects more lowers by itself
        if best is not None and self.greater_is_better is None:  # type: ignore[has-type]
            self.greater_is_better = not any(f"_{best}".endswith(f"_{name}") for name in LOWER_IS_BETTER)
        super().__post_init__()
        self._refuse_contradictions()
        self.moving_objective()  # an unknown name or option is an error now, not after the models are loaded

    def _refuse_contradictions(self) -> None:
        self._check_teacher()
        self._check_sequences()
        if self.use_liger_kernel:
            raise ConfigError("use_liger_kernel: it replaces the loss that speckd computes", "Remove it")
        if self.loss_type != "nll" or self.label_smoothing_factor:
            raise ConfigError(
                "loss_type and label_smoothing_factor belong to SFT's loss, which is not used here",
                "Remove them; label_loss_weight mixes cross-entropy in",
            )
        if self.packing and self.packing_strategy != "bfd":
            raise ConfigError(
                f"packing_strategy: '{self.packing_strategy}' joins documents that see each other, or cuts them in pieces that "
                "do not",
                "Use 'bfd': whole rows, each cut to max_length",
            )
        if self.loss_chunk_size is not None and self.loss_chunk_size < 1:
            raise ConfigError(
                f"loss_chunk_size is {self.loss_chunk_size}", "Give a number of tokens of at least 1, or leave it out"
            )
        if self.loss_memory_budget is not None:
            _bytes("loss_memory_budget", self.loss_memory_budget)
        if not 0 <= self.scrambled_teacher_fraction <= 1:
            raise ConfigError(
                f"scrambled_teacher_fraction is {self.scrambled_teacher_fraction}", "Give a share between 0 and 1"
            )
        if isinstance(self.teacher_model_init_kwargs, str):
            self.teacher_model_init_kwargs = _json("teacher_model_init_kwargs", self.teacher_model_init_kwargs)
        self._refuse_contradicting_teachers()
        if self.teacher_device is not None:
            existing_device("teacher_device", self.teacher_device)
            if "device_map" in (self.teacher_model_init_kwargs or {}):
                raise ConfigError(
                    "teacher_device and a device_map in teacher_model_init_kwargs both place the teacher", "Remove one of them"
                )

    def _check_teacher(self) -> None:
        _one_of("teacher", self.teacher, TEACHERS)
        _one_of("teacher_cache_kind", self.teacher_cache_kind, ("top_k", "sampled", "full"))
        _one_of("teacher_cache_compression", self.teacher_cache_compression, ("none", "zlib"))
        if self.teacher_cache_bits not in (16, 32):
            raise ConfigError(f"teacher_cache_bits is {self.teacher_cache_bits}", "Give 16 or 32")
        for key in ("teacher_top_k", "teacher_cache_samples"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}", "Give a number of tokens of at least 1")
        _one_of("teacher_server_api", self.teacher_server_api, ("vllm", "sglang"))
        if self.teacher_prefetch < 0:
            raise ConfigError(f"teacher_prefetch is {self.teacher_prefetch}", "Give a number of steps, or 0")
        if self.teacher == "server" and not self.teacher_server_urls:
            raise ConfigError("teacher is server, but teacher_server_urls is not set", "Give the servers' addresses")
        if self.teacher == "server" and self.dataloader_num_workers:
            raise ConfigError(
                "dataloader_num_workers: a served teacher is asked ahead from this process", "Set it to 0: nothing waits for it"
            )
        if self.teacher == "cache" and self.teacher_cache_dir is None:
            raise ConfigError(
                "teacher is cache, but teacher_cache_dir is not set", "Name the folder that 'speckd cache' filled"
            )

    def _check_sequences(self) -> None:
        self.refuse_contradicting_sequences()
        if isinstance(self.objective().divergence, SequenceDivergence):
            raise ConfigError(
                f"divergence: {self.divergence} is a policy gradient, and the data's text was not drawn from the student",
                f"Set student_text_divergence: {self.divergence}, and divergence: reverse_kl for the data's text",
            )
        if not self.writes:
            return
        if self.teacher == "cache":
            raise ConfigError(
                f"sequence_source: {self.sequence_source}: a cached teacher knows nothing of text that is written in training",
                "Set teacher: model or server, or sequence_source: dataset",
            )
        if self.packing or self.padding_free:
            raise ConfigError(
                f"sequence_source: {self.sequence_source}: packing and padding_free are not supported with written text",
                "Set both to false",
            )
        objective = self.objective()
        if not objective.needs_teacher:
            raise ConfigError(
                f"label_loss_weight: 1 (SFT) with sequence_source: {self.sequence_source}: the student's own text has no label",
                "Lower label_loss_weight, or set sequence_source: dataset",
            )
        self.student_text_objective(objective)
        if self.adaptive_on_policy and self.eval_strategy == "no":
            raise ConfigError(
                "adaptive_on_policy needs the held-out loss in training", "Set eval_strategy: steps (and eval_dataset)"
            )

    def _refuse_contradicting_teachers(self) -> None:
        of_a_model = (
            "teacher_model_name_or_path",
            "teacher_model_revision",
            "teacher_model_init_kwargs",
            "teacher_device",
            "teachers",
        )
        for key in of_a_model if self.teacher == "base" else ():
            if getattr(self, key) is not None:
                raise ConfigError(f"{key} is set, but with teacher: base the student's own base teaches", f"Remove {key}")
        for name in ("teachers", "teacher_mixture"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, _json(name, getattr(self, name)))
        self._refuse_contradicting_shares()
        if self.teacher_sharding != "none":
            self._refuse_contradicting_sharding()

    def _refuse_contradicting_sharding(self) -> None:
        how = self.teacher_sharding
        if how not in SHARDINGS:
            raise ConfigError(f"teacher_sharding: '{how}' is unknown", nearest(str(how), list(SHARDINGS)))
        if self.teacher_quantization is not None:
            raise ConfigError("teacher_sharding: a quantised teacher is not cut over processes", "Remove one of them")
        if self.teacher != "model":
            raise ConfigError(f"teacher_sharding is set, but teacher is '{self.teacher}'", "Remove teacher_sharding")
        if self.teacher_device is not None or "device_map" in (self.teacher_model_init_kwargs or {}):
            raise ConfigError(
                "teacher_sharding and teacher_device or a device_map both place the teacher", "Remove one of them"
            )
        if self.teacher_route_column is not None:
            raise ConfigError(
                "teacher_sharding: with teacher_route_column not every process asks every teacher, and the others would wait",
                "Remove one of them, or mix the teachers",
            )
        if self.world_size == 1:
            raise ConfigError(
                f"teacher_sharding: {how} cuts the teacher over processes, and there is one", "Use torchrun --nproc-per-node N"
            )

    def _refuse_contradicting_shares(self) -> None:
        """Of several teachers in the work."""
        mixture = self.teacher_mixture
        if self.teacher_route_column is not None and mixture is not None:
            raise ConfigError("teacher_route_column and teacher_mixture both say who teaches what", "Remove one of them")
        for name, weight in _names("teacher_mixture", mixture).items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
                raise ConfigError(f"teacher_mixture: the weight of {name} is {weight!r}", "Give a number above 0")
        if self.teachers is None:
            return
        if self.teacher != "model":
            raise ConfigError(f"teachers is set, but teacher is '{self.teacher}'", "Remove one of them: teachers are models")
        for key in ("teacher_model_name_or_path", "teacher_model_revision"):
            if getattr(self, key) is not None:
                raise ConfigError(f"{key} and teachers are both set", f"Remove {key}, or give one teacher by it")
        for name, path in _names("teachers", self.teachers).items():
            if not isinstance(path, str):
                raise ConfigError(f"teachers: {name} is {path!r}", "Give a path or hub id")
        if self.teacher_route_column is None and mixture is None:
            raise ConfigError(
                "teachers is set, but nothing says who teaches what", "Set teacher_route_column, or teacher_mixture"
            )
        if mixture is not None:
            require_weights(list(self.teachers), mixture)

    def chunk_size(self, vocabulary: int) -> int:
        """Tokens whose logits the loss holds at once: as given, or as many as the budget holds, up to what speed asks for.

        Raises:
            ConfigError: the budget does not hold the fewest that are computed at once.
        """
        if self.loss_chunk_size is not None:
            return self.loss_chunk_size
        if self.loss_memory_budget is None:
            return default_chunk_size(vocabulary, self.device.type)
        budget = _bytes("loss_memory_budget", self.loss_memory_budget)
        fewest = default_chunk_size(vocabulary, self.device.type, budget_bytes=0)
        least = 8 * fewest * vocabulary  # in float32, the student's and the teacher's
        if budget < least:
            raise ConfigError(
                f"loss_memory_budget: {self.loss_memory_budget} cannot hold the logits of {fewest} tokens over a vocabulary of "
                f"{vocabulary:,}, and fewer are not computed at once",
                f"Give at least {math.ceil(least / 2**20)}MiB, or set loss_chunk_size",
            )
        return default_chunk_size(vocabulary, self.device.type, budget)

    @property
    def teacher_quantization(self) -> Any:
        """How the teacher is quantised when it is loaded, None where it is not. The student's is another key."""
        given: Any = self.teacher_model_init_kwargs or {}
        shortcuts = {key: True for key in QUANTIZATION[1:] if given.get(key)}
        whole = given.get("quantization_config")
        if not shortcuts:
            return whole
        if whole is not None:
            raise ConfigError(
                f"teacher_model_init_kwargs: {next(iter(shortcuts))} and quantization_config both quantise the teacher",
                "Write it into quantization_config",
            )
        return shortcuts

    @property
    def effective_gate_seed(self) -> int:
        return self.seed if self.gate_seed is None else self.gate_seed


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{key}: '{value}' is not one of its values", nearest(str(value), list(known)))


def require_weights(names: Iterable[str], mixture: Any) -> None:
    """Refuses weights of nobody, and teachers without one."""
    names = list(names)
    for name in mixture:
        if name not in names:
            raise ConfigError(f"teacher_mixture: '{name}' is not among the teachers", nearest(str(name), names))
    for name in names:
        if name not in mixture:
            raise ConfigError(f"teacher_mixture: {name} has no weight", "Give it one, or remove it from teachers")


def _names(key: str, given: Any) -> dict[str, Any]:
    if given is not None and (not isinstance(given, dict) or not given):
        raise ConfigError(f"{key} is {given!r}", "Give a mapping of names")
    return given or {}


def _bytes(key: str, text: str) -> int:
    try:
        return convert_file_size_to_int(str(text))
    except (ValueError, OverflowError):
        raise ConfigError(f"{key} is '{text}'", "Give a number with a unit, such as 256MiB or 1GiB") from None


def _json(key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{key} is not JSON: {error}", f'Write for example --{key} \'{{"dtype": "bfloat16"}}\'') from None
