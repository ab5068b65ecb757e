"""`SpecKDTrainer`: TRL's `SFTTrainer` with the objective as its loss. Data, loop, checkpoints and logging are TRL's.

Every loss is a sum over supervised tokens, divided once by the count of the whole optimizer step: all micro-batches of the
gradient accumulation, on all processes.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback
from trl import SFTTrainer

from speckd.arguments import QUANTIZATION, SpecKDConfig, require_weights
from speckd.collation import (
    EXAMPLE,
    SAMPLE,
    TEACHER,
    DroppedRows,
    SampleCollator,
    Wanted,
    as_token_batch,
    distinct,
    keep_supervised,
    longest_row,
    mask_repeated,
    number_rows,
    number_teachers,
    require_isolation,
    require_known_tokens,
    sequences_in,
    spread_sample_ids,
)
from speckd.compatibility import SharedVocabulary, common_axis, shared_vocabulary
from speckd.early_rejection import EarlyRejection
from speckd.engine import LossOutput, distillation_loss
from speckd.errors import (
    CapabilityError,
    ConfigError,
    DataError,
    NonFiniteError,
    SpeckdError,
    VocabularyError,
)
from speckd.evaluate import HeldOutSums, measure
from speckd.gathering import gather_by
from speckd.head import LMHead, check_head
from speckd.lookahead import Lookahead
from speckd.metrics import AcceptanceTally, StarvationWatch
from speckd.moving import Clock, MovingObjective, Seen
from speckd.objective import Objective
from speckd.on_policy import WRITTEN, StepClock, StudentText, first_prompt, longest_prompt
from speckd.origins import loss_by_origin
from speckd.own_writer import CheckedWriter, own_writer
from speckd.reference_model import reference_source
from speckd.round_trip import template_end
from speckd.sources.completions import CollapseWatch
from speckd.sources.interleaved import InterleavedWriter
from speckd.sources.mixed import MixedWriter
from speckd.sources.mixture import AdaptiveFraction
from speckd.sources.model_writer import ModelWriter, stop_ids
from speckd.sources.replay import ReplayBuffer
from speckd.sources.served_student import ServedStudent
from speckd.sources.writer import Writer, WriterContext
from speckd.spans import DATA, GENERATION, HEAD_AND_LOSS, OPTIMIZER, STUDENT_FORWARD, span
from speckd.student_servers import served_student
from speckd.teachers import ScrambledTeacher
from speckd.teachers.base import BaseSource
from speckd.teachers.model import ModelSource, on_device
from speckd.teachers.served import ServedSource
from speckd.teachers.several import MixedSource, RoutedSource
from speckd.teachers.sharding import ShardedModel, shard
from speckd.teachers.shared_prompt import PromptSharing, may_pay, why_not_shared
from speckd.teachers.source import PendingAnswer, Question, TeacherSource, require_answers
from speckd.tokens import SupervisedRows, TokenBatch, supervised_rows
from speckd.trl_internals import announce_batches, call_through, is_sharded_by_deepspeed_or_fsdp, remember_order
from speckd.types import Capabilities, TeacherRows

logger = logging.getLogger(__name__)

#: What belongs to the loss and not to a model's forward.
_NOT_FOR_THE_MODEL = {"labels", SAMPLE, EXAMPLE, TEACHER, WRITTEN}


#: Where the Trainer's state keeps what controllers of the objective remember.
_MEMORIES = "speckd_moving_objective"


def load_teacher(name: str, args: SpecKDConfig, dtype: torch.dtype | str) -> PreTrainedModel:
    """The teacher by path or hub id, with `teacher_options`."""
    return AutoModelForCausalLM.from_pretrained(name, **teacher_options(args, dtype))


def teacher_options(args: SpecKDConfig, dtype: torch.dtype | str) -> dict[str, Any]:
    """For `from_pretrained`: bfloat16 with `bf16`, else `dtype`, unless `teacher_model_init_kwargs` says otherwise.

    A teacher that is to be quantised is put on its device at once, for it cannot be moved later.
    """
    found: dict[str, Any] = {"dtype": torch.bfloat16 if args.bf16 else dtype, "trust_remote_code": args.trust_remote_code}
    quantised = args.teacher_quantization
    if quantised is not None:
        found |= {"device_map": {"": args.teacher_device or str(args.device)}, "quantization_config": quantised}
    given: Any = args.teacher_model_init_kwargs or {}
    given = {key: value for key, value in given.items() if key not in QUANTIZATION}
    return {**found, "revision": args.teacher_model_revision or "main", **given}


def load_teacher_tokenizer(name: str, args: SpecKDConfig) -> Any:
    revision = args.teacher_model_revision or "main"
    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)


class SpecKDTrainer(SFTTrainer):
    """Distils a teacher into a student, token by token where the gate accepts.

    Args:
        model: the student, a model or a path or hub id.
        teacher_model: the teacher, likewise; may be None where the objective needs none (SFT), and then serves evaluation only.
            Several, by name, share the work as `args.teacher_route_column` or `args.teacher_mixture` says.
        args: `SpecKDConfig`.
        train_dataset, eval_dataset: in TRL's shapes (prompt and completion, messages, text) or tokenised.
        processing_class: the student's tokenizer.
        teacher_processing_class: the teacher's tokenizer; by default, the one saved with the teacher.
        peft_config, callbacks, optimizers, quantization_config: as of `SFTTrainer`.
        objective: by default, what `args` describes; one that moves with the step is given anew to each.
        teacher_source: a teacher that is no model in this process (`speckd.teachers`), in the place of `teacher_model`.
        reference_model: what some gates compare the student with, a model or a path or hub id; by default,
            `args.reference_model_name_or_path`.
        writer: who writes where `sequence_source` asks for written text; by default, the student in this process.

    Raises:
        SpeckdError: models, data or settings that do not fit together, before the first step.
    """

    data_collator: Any
    control: Any
    _signature_columns: Any
    _tag_names = ["trl", "speckd", "distillation"]  # noqa: RUF012  (TRL's own convention)

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher_model: str | PreTrainedModel | Mapping[str, str | PreTrainedModel] | None = None,
        args: SpecKDConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        teacher_processing_class: Any = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        objective: Objective | MovingObjective | None = None,
        teacher_source: TeacherSource | None = None,
        reference_model: str | PreTrainedModel | None = None,
        writer: Writer | None = None,
    ) -> None:
        if args is None:
            raise ConfigError("SpecKDTrainer was given no args", "Pass args=SpecKDConfig(output_dir=...)")
        self.moving = MovingObjective(objective) if isinstance(objective, Objective) else objective or args.moving_objective()
        self.objective = self.moving.at(Clock(0, 0), {})
        nobody = teacher_model is None and teacher_source is None and args.teacher != "base"
        if nobody and self.objective.needs_teacher:
            raise ConfigError("no teacher is given", "Set teacher_model_name_or_path, or label_loss_weight: 1 for SFT")
        if teacher_model is not None and teacher_source is not None:
            raise ConfigError("both teacher_model and teacher_source are given", "Pass one of them")
        _refuse_unasked(writer, args)
        reference_model = reference_model or args.reference_model_name_or_path
        _require_reference(self.objective, reference_model)
        self._teacher_names = list(teacher_model) if isinstance(teacher_model, Mapping) else []
        _require_shares(args, self._teacher_names)
        self._answer_ends: frozenset[int] = frozenset()  # by the chat template, where text is written
        self.dropped_rows: dict[str, DroppedRows] = {}
        self.longest_row: dict[str, int] = {}  # tokens
        self.warnings: list[str] = []  # what went wrong in training, for the card
        self.tasks: list[str] | None = None  # of each held-out row (without any, of each to train on), where they are known
        args.eval_packing = False  # held-out rows are measured one by one
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
        )
        self.model_accepts_loss_kwargs = True  # the loss is divided by the whole step's count: nobody divides it again
        self.data_collator = SampleCollator(
            pad_token_id=self.processing_class.pad_token_id,
            padding_free=self.padding_free,
            pad_to_multiple_of=self.data_collator.pad_to_multiple_of,
        )
        self._refuse_unsupported_students()
        width = self.student.get_output_embeddings().weight.shape[0]
        self.teacher: Any = None  # the model, where it is one in this process
        self.teachers: dict[str, Any] = {}  # where there are several
        self.shards: list[ShardedModel] = []  # of the teachers, where they are cut over processes
        self.model_sources: list[ModelSource] = []  # of teachers with weights of their own in this process
        self.source = teacher_source or self._source_of(teacher_model, teacher_processing_class, width)
        self.vocabulary = SharedVocabulary(width) if self.source is None else self.source.vocabulary
        # Of SFT the teacher is but a measure.
        self._training_vocabulary = self.vocabulary if self.objective.needs_teacher else SharedVocabulary(width)
        if self.source is not None:
            self._check_capabilities(self.source)
        self.require_measured(args)
        self.reference = self._reference_of(reference_model)
        self._gather = gather_by(self.accelerator)  # a gate that ranks a batch ranks that of all processes
        # How the loss is computed, whatever it is: tokens at once, and whether rejections are proved early.
        early = EarlyRejection() if args.early_rejection and not args.teacher_mixture else None  # few logits prove no mixture
        self._how = args.chunk_size(self._training_vocabulary.size), early
        self._check_models()
        self._check_data()
        self._clock = StepClock(self._step_made)
        self.served_student: ServedStudent | None = None  # where servers write for it
        self.student_text = self._writing(writer) if args.writes else None
        for source in self.model_sources:
            source.sharing = self._prompt_sharing(source)
        self._begin_counting()

    # ---- set-up --------------------------------------------------------------------------------------------------------

    def _refuse_unsupported_students(self) -> None:
        if is_sharded_by_deepspeed_or_fsdp(self):
            raise CapabilityError("DeepSpeed and FSDP shard the head, which is not supported yet", "Use DDP (torchrun)")
        if self.args.n_gpu > 1:
            raise CapabilityError(
                "one process with several GPUs would split each batch between copies of the student",
                "Start one process a GPU (torchrun --nproc-per-node N -m speckd train ...), or show it one only",
            )
        if self.aux_loss_enabled:
            logger.warning("The student is a mixture of experts: its router's auxiliary loss is not part of the objective.")

    def _begin_counting(self) -> None:
        threshold, patience = self.args.starvation_threshold, self.args.starvation_patience
        self._tally, self._watch = AcceptanceTally(), StarvationWatch(threshold, patience)
        self._logged_step: int | None = None
        self._step_sums = torch.zeros(4, dtype=torch.float64)  # of one optimizer step: loss, weight, TAR and its sequences
        self._step_losses: list[float] = []  # since the last log
        self._run_loss = [0.0, 0]  # over the whole run: sum of the steps' losses, steps
        self._valid = 0.0

    @property
    def student(self) -> Any:
        """The causal language model itself, inside PEFT and distributed wrappers."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model

    def _source_of(self, teacher: Any, tokenizer: Any, width: int) -> TeacherSource | None:
        """The teacher in this process, if there is one. `width`: rows of the student's head."""
        if isinstance(teacher, Mapping):
            self.teachers = {name: self._loaded_teacher(model) for name, model in teacher.items()}
            return self._source_of_several(width)
        if teacher is None:
            return self._base_source(width) if self.args.teacher == "base" else None
        self.teacher = self._loaded_teacher(teacher)
        source = ModelSource(self.teacher, self._vocabulary_with(self.teacher, tokenizer, width), self.accelerator.device)
        self.model_sources = [source]
        return source

    def _loaded_teacher(self, teacher: Any) -> Any:
        """By path or hub id, or given; on its device, frozen."""
        model = load_teacher(teacher, self.args, self.student.dtype) if isinstance(teacher, str) else teacher
        model.eval().requires_grad_(False)
        if self.args.teacher_sharding != "none":
            self.shards.append(shard(model, self.args.teacher_sharding, self.accelerator.device))
        elif not getattr(model, "hf_device_map", None) and not getattr(model, "is_quantized", False):  # those stay in place
            model.to(self.args.teacher_device or self.accelerator.device)
        return model

    def _source_of_several(self, width: int) -> TeacherSource:
        axes = common_axis([self._vocabulary_with(model, None, width) for model in self.teachers.values()])
        device, mixture = self.accelerator.device, self.args.teacher_mixture
        self.model_sources = [ModelSource(*each, device) for each in zip(self.teachers.values(), axes, strict=True)]
        if mixture is None:
            return RoutedSource(self.model_sources)
        return MixedSource(self.model_sources, [mixture[name] for name in self.teachers])

    def _base_source(self, width: int) -> BaseSource:
        own = self.processing_class
        adapted, device = self.accelerator.unwrap_model(self.model), self.accelerator.device
        source = BaseSource(adapted, shared_vocabulary(own, own, width, width), device, self.accelerator.autocast)
        if self.objective.needs_teacher and not self.objective.label_loss_weight:
            logger.warning(
                "teacher: base: the student starts as its teacher, where no divergence has a gradient, and most gates accept "
                "every token. Set label_loss_weight, or nothing may be learnt."
            )
        return source

    def _reference_of(self, reference: Any) -> ModelSource | None:
        """What the gate compares the student with, if it asks for that."""
        if not self.objective.needs_reference:
            return None
        return reference_source(reference, self.args, self.processing_class, self._training_vocabulary, self.student)

    def _vocabulary_with(self, teacher: Any, tokenizer: Any, width: int) -> SharedVocabulary:
        """What the teacher's model and its tokenizer (by default, the one saved with it) share with the student."""
        if tokenizer is None:
            if not teacher.name_or_path:
                raise ConfigError("the teacher has no tokenizer to compare with the student's", "Pass teacher_processing_class")
            tokenizer = load_teacher_tokenizer(teacher.name_or_path, self.args)
        theirs = teacher.get_output_embeddings().weight.shape[0]
        return shared_vocabulary(self.processing_class, tokenizer, width, theirs)

    def _check_capabilities(self, source: TeacherSource) -> None:
        for objective in self.moving.extremes():
            require_answers(objective, source.capabilities, source.vocabulary.size)
        if self.args.scrambled_teacher_fraction and source.capabilities.top_k is not None:
            raise CapabilityError(
                "scrambled_teacher_fraction: only a teacher with its whole vocabulary can be scrambled",
                "Remove it, or use the teacher's model",
            )

    def require_measured(self, args: SpecKDConfig) -> None:
        """Refuses to choose checkpoints by what evaluation will not give, which would end the run at the first one."""
        best = args.metric_for_best_model
        if best is None or args.eval_strategy == "no":
            return
        known = None if self.source is None else self.source.capabilities
        measured = ["loss", *HeldOutSums(tokens=1, sequences=1).result(known)]
        parts = [f"{name}_" for name in self.eval_dataset] if isinstance(self.eval_dataset, dict) else [""]
        given = [f"{part}{name}" for part in parts for name in measured]
        if best.removeprefix("eval_") in given:
            return
        bound = f"{best.removeprefix('eval_')}_at_least"
        raise ConfigError(
            f"metric_for_best_model: {best} is not among what is measured with this teacher",
            f"Set metric_for_best_model: {bound}" if bound in given else f"Take one of {', '.join(given)}",
        )

    def _writing(self, writer: Writer | None) -> StudentText:
        """What replaces completions of the data by written ones."""
        args, prompt = self.args, longest_prompt(self.train_dataset, "train")
        if args.adaptive_on_policy and isinstance(self.eval_dataset, dict):
            raise ConfigError("adaptive_on_policy follows one held-out loss, and there are several", "Give one eval_dataset")
        positions = self._positions()
        if positions is not None and prompt >= positions:
            raise ConfigError(f"a prompt has {prompt} tokens, and the models {positions} positions", "Lower max_length")
        longest = prompt + args.max_completion_length
        self.longest_row["written"] = longest if positions is None else min(longest, positions)
        self.add_callback(self._clock)
        writer = self._own_writer(prompt, positions) if writer is None else self._checked(writer, positions)
        self.served_student = writer if isinstance(writer, ServedStudent) else None
        return StudentText(
            writer,
            args.sampling,
            args.mixture(args.seed),
            lambda examples: self._prepare_inputs(self.data_collator(examples)),
            gather_object,
            CollapseWatch(args.collapse_threshold, args.collapse_patience),
            ReplayBuffer(args.replay_capacity) if args.sequence_source == "replay" else None,
            args.sequence_source == "paired",
            AdaptiveFraction(args.on_policy_fraction) if args.adaptive_on_policy else None,
            self.served_student,
        )

    def _writer_context(self, positions: int | None) -> WriterContext:
        student = self.student
        stops = tuple(sorted({*stop_ids(student, self.processing_class), *self._answer_ends}))
        unshared = self._training_vocabulary.outside(student.get_output_embeddings().weight.shape[0])
        return WriterContext(student, self.processing_class, stops, unshared, positions, self.accelerator.autocast)

    def _checked(self, writer: Writer, positions: int | None) -> Writer:
        """One that was given; servers of the student's look at what they get themselves."""
        if isinstance(writer, ServedStudent):
            return writer
        return CheckedWriter(f"writer: {type(writer).__name__}", writer, self._writer_context(positions))

    def _own_writer(self, prompt: int, positions: int | None) -> Writer:
        """As the settings say: the student here or on servers, its teacher beside it where both write, or the user's own.

        `prompt`: tokens of the longest.
        """
        student, args, there = self.student, self.args, self._writer_context(positions)
        stops, unshared = there.stop_ids, there.suppressed
        if args.own_writer:
            return own_writer(args.sequence_source, there, first_prompt(self.train_dataset), args.sampling)
        if args.student_server_urls:
            text = self.train_dataset[0]["input_ids"]
            return served_student(args, there, self.accelerator, self.model, text, prompt)
        if args.sequence_source not in ("interleaved", "mixed"):
            return ModelWriter(student, stops, unshared, positions, self.accelerator.autocast)
        if not isinstance(self.source, ModelSource) or self.shards:
            raise ConfigError(
                f"sequence_source: {args.sequence_source} asks one teacher about every token, whole and in this process",
                "Set teacher: model and teacher_model_name_or_path, without teacher_sharding",
            )
        both, context = (student, self.source.model, self.vocabulary, stops), self.accelerator.autocast
        if args.sequence_source == "mixed":
            return MixedWriter(*both, args.teacher_mix, student_context=context)
        return InterleavedWriter(*both, args.interleaved_top_k, args.interleaved_block, student_context=context)

    def _positions(self) -> int | None:
        """Of the model in this process that has the fewest."""
        models = [self.student, self.teacher, *self.teachers.values(), None if self.reference is None else self.reference.model]
        configs = [model.config.get_text_config() for model in models if model is not None]
        found = [getattr(config, "max_position_embeddings", None) for config in configs]
        return min((number for number in found if number is not None), default=None)

    def _prompt_sharing(self, source: ModelSource) -> PromptSharing | None:
        """How the teacher computes a start that several rows share once; None where that cannot be, said if it was wanted."""
        rows = max(self.args.per_device_train_batch_size, self.args.per_device_eval_batch_size)
        longest = max(self.longest_row.values(), default=0)
        wanted = self.args.share_teacher_prompt and not self.shards  # processes would ask the pieces unequally often
        if not wanted or self.padding_free or not may_pay(rows, longest):
            return None
        decoder = source.model.get_decoder()
        reason = why_not_shared(decoder, longest, source.device)
        if reason is None:
            return PromptSharing(decoder, longest)
        logger.warning(
            "share_teacher_prompt: the teacher (%s) computes every row's prompt anew: %s. Set it to false to skip the test.",
            type(source.model).__name__,
            reason,
        )
        return None

    def _check_models(self) -> None:
        several = [(model, f"teacher {name}") for name, model in self.teachers.items()]
        if self.reference is not None:
            several.append((self.reference.model, "reference model"))
        for model, name in ((self.student, "student"), (self.teacher, "teacher"), *several):
            if model is not None:
                self._check_positions(model, name)
                check_head(model, name)
                if self.padding_free:
                    require_isolation(model, name)

    def _check_positions(self, model: Any, name: str) -> None:
        config = model.config.get_text_config()
        positions, unit = getattr(config, "max_position_embeddings", None), self.args.pad_to_multiple_of or 1
        longest = math.ceil(max(self.longest_row.values(), default=0) / unit) * unit
        if positions is None or longest <= positions:
            return
        said = f"the longest row has {longest} tokens, but the {name} was made for {positions} positions"
        if getattr(config, "rope_parameters", None) is None:  # learned positions: there are no others
            raise ConfigError(f"max_length: {said}", f"Set max_length to at most {positions}")
        logger.warning("%s: what it says beyond them may be worthless. Set max_length to at most %d.", said, positions)

    def _check_data(self) -> None:
        if self.source is None:
            return
        if self.objective.needs_teacher:
            require_known_tokens(self.train_dataset, self.vocabulary, "train")
        held_out = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for name, dataset in held_out.items():
            if dataset is not None:
                require_known_tokens(dataset, self.vocabulary, name)
        for source in self.model_sources if self.objective.needs_teacher else ():
            if not source.vocabulary.teacher_only:
                continue
            dropped = self.mass(source.model, torch.tensor(source.vocabulary.teacher_only), source.device)
            if dropped > self.args.max_dropped_mass:
                who = ("the teacher", "the student does")
                if self.teachers:
                    who = (f"the teacher {source.model.name_or_path}", "the student or another teacher does")
                raise VocabularyError(
                    f"{who[0]} puts {dropped:.2%} of its probability on tokens that {who[1]} not have",
                    f"Use models with the same tokens, or accept it: max_dropped_mass above {dropped:.2g}",
                )

    @torch.no_grad()
    def mass(self, model: Any, token_ids: Tensor, device: torch.device | None = None) -> float:
        """Mean probability that student or teacher (on its device) gives to some tokens, [n] int64, in the first rows."""
        chosen = [self.train_dataset[i] for i in range(min(4, len(self.train_dataset)))]
        inputs = self._prepare_inputs(self.data_collator(chosen))
        training = model.training
        model.eval()
        own = on_device(_model_inputs(inputs), device or self.accelerator.device)
        hidden = model.get_decoder()(**own, use_cache=False).last_hidden_state.flatten(0, 1)
        model.train(training)
        some = supervised_rows(as_token_batch(inputs, inputs["labels"])).index[:64]
        probs = LMHead.from_model(model)(hidden[some.to(hidden.device)]).softmax(-1)
        return float(probs[:, token_ids.to(probs.device)].sum(-1).mean())

    def _prepare_dataset(  # the parent's signature
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Dataset:
        if isinstance(dataset, IterableDataset):
            raise DataError(f"the {dataset_name} data is a stream", "Load it without streaming: rows are counted and numbered")
        total, column = len(dataset), args.teacher_route_column
        first = dataset[0] if total else {}
        if column is not None:
            dataset = number_teachers(dataset, column, self._teacher_names, f"the {dataset_name} data")
        try:
            prepared = super()._prepare_dataset(
                number_rows(dataset), processing_class, args, False, formatting_func, dataset_name
            )
        except (RuntimeError, ValueError) as error:  # TRL's own refusals: missing assistant turns, odd templates
            reason = str(error).split(". ", maxsplit=1)[0]
            raise DataError(
                f"the {dataset_name} data cannot be prepared: {reason}", "Check the data and its chat template"
            ) from error
        if dataset_name == "train" and args.writes:
            self._answer_ends = template_end(processing_class, first)
        prepared, self.dropped_rows[dataset_name] = keep_supervised(prepared, total, dataset_name, args.max_length)
        self.longest_row[dataset_name] = longest_row(prepared, dataset_name, args.max_length)
        return spread_sample_ids(prepared, packing, args.max_length, args.packing_strategy)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if SAMPLE not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, SAMPLE, TEACHER]

    def sequences(self) -> list[Wanted]:
        """What a teacher will be asked about, in training and in evaluation, each sequence once."""
        return distinct(self.all_sequences())

    def all_sequences(self) -> Iterator[Wanted]:
        """The same as often as it stands in the data, without holding it."""
        held_out = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for dataset in (self.train_dataset, *held_out.values()):
            yield from () if dataset is None else sequences_in(dataset)

    def close(self) -> None:
        """Lets go of teacher and writer, with the connections and threads of their servers: neither can be asked afterwards."""
        if self.source is not None:
            self.source.close()
        if self.served_student is not None:
            self.served_student.close()

    # ---- loss ----------------------------------------------------------------------------------------------------------

    def _rows(self, inputs: dict[str, Any], vocabulary: SharedVocabulary | None = None) -> SupervisedRows:
        """A batch's supervised tokens: on training's axis in the running epoch; held out, on a given axis as in epoch 0."""
        epoch = math.floor((self.state.epoch or 0) + 1e-6) if vocabulary is None else 0
        labels = (vocabulary or self._training_vocabulary).labels(inputs["labels"])
        return supervised_rows(as_token_batch(inputs, labels), self.args.effective_gate_seed, epoch)

    def get_train_dataloader(self) -> Any:
        """TRL's own; where the teacher has to be fetched, it hears of the batches ahead."""
        loader = super().get_train_dataloader()
        depth = self.args.teacher_prefetch * self.args.gradient_accumulation_steps
        served = isinstance(self.source, ServedSource) and self.objective.needs_teacher
        if not served or not depth or self.args.writes:  # of what will be written nobody knows yet
            return loader
        assert isinstance(self.source, ServedSource)
        ahead = Lookahead(
            self.train_dataset,
            SAMPLE,
            self.args.per_device_train_batch_size,
            depth,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self._expect,
            self.source.forget_expected,
        )
        remember_order(loader, ahead.begin)
        announce_batches(loader, ahead.collated)
        return loader

    def _expect(self, examples: list[Any]) -> None:
        assert self.source is not None
        batch = self.data_collator(examples)
        self.source.expect(self._question(batch, self._rows(batch)))

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The step's micro-batches, and how many supervised tokens they hold on all processes; the objective moves on."""
        self._move()
        if self._logged_step is None or self._logged_step > self.state.global_step:
            self._logged_step = self.state.global_step  # where training starts or resumes
        self._clock.begin()
        with span(DATA):
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
            self._mask_repeated_rows(batches)
            lost = None
            if self.student_text is not None:
                with span(GENERATION):
                    batches, lost = self.student_text.rewrite(batches, self.state.global_step, self.state.max_steps)
            rows = [self._rows(batch) for batch in batches]
            asked = zip(batches, rows, strict=True) if self.objective.needs_teacher and lost is None else ()
            lost = lost or self._settle([self._question(*each) for each in asked])
            count = torch.tensor([sum(map(len, rows)), lost is not None], device=device)
            count, losers = self.accelerator.reduce(count, "sum").unbind()
            self._stop_where_lost(lost, int(losers))
            self._stop_where_collapsed()
            return batches, count

    def _move(self) -> None:
        """The objective of the step at hand. What controllers remember is in the Trainer's state, and so in its checkpoints."""
        self.objective = self.moving.at(self._moment, self.state.stateful_callbacks.get(_MEMORIES, {}))

    @property
    def _moment(self) -> Clock:
        return Clock(self.state.global_step, self.state.max_steps)

    def _stop_where_collapsed(self) -> None:
        """Before the step is trained on; all processes count the same, and so stop together."""
        if self.student_text is not None:
            everyones = self.student_text.step_counts.float().to(self.accelerator.device)
            self.student_text.judge(self.accelerator.reduce(everyones, "sum").double().cpu())

    def _step_made(self) -> None:
        if self.student_text is not None:
            self.student_text.commit()

    def _settle(self, questions: list[Question]) -> SpeckdError | None:
        """Waits for the teacher before a step; what it raised, for all processes must hear of it."""
        try:
            if self.source is not None:
                self.source.settle(questions)
        except SpeckdError as error:
            return error
        return None

    def _stop_where_lost(self, lost: SpeckdError | None, losers: int) -> None:
        """Everywhere with the cause, for the first process that ends takes the others, and what they had to say, with it."""
        told_by_all = gather_object([None if lost is None else (type(lost), lost.what, lost.fix)]) if losers else []
        if lost is not None:
            raise lost
        if losers:
            kind, what, fix = next(told for told in told_by_all if told is not None)
            raise kind(f"another process: {what}", fix)

    def _mask_repeated_rows(self, batches: list[dict[str, Any]]) -> None:
        """An epoch's last batches are filled up with rows seen before, so that processes have as many: learn none twice."""
        if not batches or not self.accelerator.gradient_state.end_of_dataloader or self.args.dataloader_drop_last:
            return
        own, processes = self.args.per_device_train_batch_size, self.accelerator.num_processes
        if self.accelerator.split_batches:
            own //= processes
        # Accelerate's own `remainder` is not to be had after a resume in mid-epoch.
        real = len(self.train_dataset) % (own * processes) or own * processes
        mask_repeated(batches[-1], real - self.accelerator.process_index * own)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """One micro-batch's share of the step's loss: its sum over the count of the whole step."""
        rows = self._rows(inputs)
        output = self._objective_output(model, inputs, rows)
        tally = AcceptanceTally()
        tally.add(output)
        self._tally.merge(tally.sums)
        count = len(rows) if num_items_in_batch is None else num_items_in_batch
        self._valid = float(count)
        self._step_sums += torch.cat([torch.stack([output.sum.detach(), output.count]).double().cpu(), tally.sums[0]])
        # DDP averages gradients over processes; the count is already everyone's.
        return output.sum / max(self._valid, 1.0) * self.accelerator.num_processes

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """(loss, no logits, no labels): whole logits are never made, so `predict` gives metrics only."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            output = self._objective_output(model, inputs, self._rows(inputs, self._training_vocabulary))
        return output.sum / output.count.clamp(min=1), None, None

    def _objective_output(self, model: Any, inputs: dict[str, Any], rows: SupervisedRows) -> LossOutput:
        """The loss of a batch, computed inside the wrapped student's forward."""
        pending = self._ask(inputs, rows) if self.objective.needs_teacher else None
        asked = self._ask_reference(inputs, rows)
        student, seen = self.student, {}

        def loss(**own: Any) -> dict[str, Tensor]:
            with span(STUDENT_FORWARD):
                hidden = student.get_decoder()(**own, use_cache=False).last_hidden_state
            with span(HEAD_AND_LOSS):
                head = self._training_vocabulary.restrict(LMHead.from_model(student))
                teacher = self._answers(pending, inputs)  # after the student's forward: two devices work at the same time
                third = None if asked is None else asked.rows()
                seen["output"] = self._loss(inputs, hidden.flatten(0, 1), head, teacher, rows, third)
            return {"loss": seen["output"].sum}

        with self.accelerator.autocast():
            call_through(model, student, loss, _model_inputs(inputs))
        return seen["output"]

    def _loss(
        self,
        inputs: dict[str, Any],
        hidden: Tensor,
        head: LMHead,
        teacher: TeacherRows | None,
        rows: SupervisedRows,
        reference: TeacherRows | None,
    ) -> LossOutput:
        """By whose text each row is."""
        how = (*self._how, reference, self._gather)
        own = self.args.student_text_objective(self.objective) if self.args.writes else self.objective
        if WRITTEN not in inputs or own == self.objective:
            return distillation_loss(self.objective, hidden, head, teacher, rows, *how)
        written = inputs[WRITTEN][rows.index // inputs["input_ids"].shape[1]]
        return loss_by_origin(self.objective, own, written, hidden, head, teacher, rows, *how)

    def _question(self, inputs: dict[str, Any], rows: SupervisedRows) -> Question:
        return Question(_model_inputs(inputs), as_token_batch(inputs, inputs["labels"]), rows, inputs.get(TEACHER))

    def _ask(self, inputs: dict[str, Any], rows: SupervisedRows) -> PendingAnswer | None:
        return None if self.source is None else self.source.launch(self._question(inputs, rows))

    def _ask_reference(self, inputs: dict[str, Any], rows: SupervisedRows) -> PendingAnswer | None:
        return None if self.reference is None else self.reference.launch(self._question(inputs, rows))

    @torch.no_grad()
    def _answers(self, pending: PendingAnswer | None, inputs: dict[str, Any], reliable: bool = False) -> TeacherRows | None:
        """The teacher's answers for a batch; scrambled in training where the stress test asks for it."""
        if pending is None:
            return None
        answers = pending.rows()
        if reliable or not self.args.scrambled_teacher_fraction:
            return answers
        batch: TokenBatch = as_token_batch(inputs, inputs["labels"])
        return ScrambledTeacher(
            answers,
            self.args.scrambled_teacher_fraction,
            batch.sample_ids.flatten(),
            batch.position_ids.flatten(),
            self.args.seed,
        )

    # ---- one division by the whole step's count ------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.student_text is not None and self.is_world_process_zero():
            self.student_text.save(Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}")
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.student_text is not None:
            self.student_text.load(Path(resume_from_checkpoint))

    def _finish_step(self, model: Any) -> None:
        """With normalizer "weight" the count is known only after the last micro-batch: gradients are rescaled to it here."""
        total, weight, accepted, sequences = self.accelerator.reduce(
            self._step_sums.to(self.accelerator.device), "sum"
        ).tolist()
        self._step_sums.zero_()
        count = weight if self.objective.normalizer == "weight" else self._valid
        self._step_losses.append(total / count if count else 0.0)
        self._run_loss = [self._run_loss[0] + self._step_losses[-1], self._run_loss[1] + 1]
        if self.moving.moved:
            seen = Seen(self._step_losses[-1], accepted / sequences if sequences else None)
            known = self.state.stateful_callbacks
            known[_MEMORIES] = self.moving.remember(self._moment, known.get(_MEMORIES, {}), seen)
        if self.objective.normalizer == "weight" and weight and weight != self._valid:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self._valid / weight)

    def _clip_grad_norm(self, model: Any) -> Any:
        with span(OPTIMIZER):
            self._finish_step(model)
            return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None:  # clipping is off
            self._finish_step(model)
        found = super()._get_grad_norm(model, grad_norm=grad_norm)
        if found is not None and not math.isfinite(found) and not self.args.fp16:  # float16 scaling skips such steps by itself
            raise NonFiniteError(
                f"the gradient's norm is {found} at step {self.state.global_step + 1}; the student was not changed by it",
                "Lower the learning rate, or train in float32 or bfloat16",
            )
        return found

    # ---- what is said --------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.window_metrics()
        if "train_loss" in logs and self._run_loss[1]:
            logs["train_loss"] = self._run_loss[0] / self._run_loss[1]
            self.window_metrics()  # the steps since the last log may have starved, too
        super().log(logs, start_time)

    def window_metrics(self) -> dict[str, float]:
        """Means over the steps since the last log, on all processes."""
        losses, self._step_losses = self._step_losses, []
        tally, self._tally = self._tally, AcceptanceTally()
        sums = self.accelerator.reduce(tally.sums.to(self.accelerator.device), "sum").cpu()
        found = AcceptanceTally()
        found.merge(sums)
        metrics = {"loss": sum(losses) / len(losses)} if losses else {}
        metrics |= found.result() | self.moving.values(self.objective)
        positions = torch.zeros(2, dtype=torch.int64)
        if isinstance(self.source, ModelSource):
            positions, self.source.positions = self.source.positions, positions
        computed, whole = self.accelerator.reduce(positions.to(self.accelerator.device), "sum").tolist()
        if whole:
            metrics["teacher_computed"] = computed / whole
        if self.student_text is not None:
            sums = self.student_text.window_sums(self._clock.taken()).float().to(self.accelerator.device)
            metrics |= self.student_text.metrics(self.accelerator.reduce(sums, "sum").double().cpu())
            self._show_completion()
        if "tar" in metrics and self.is_world_process_zero():
            warning = self._watch.update(metrics["tar"], self.state.global_step - (self._logged_step or 0))
            if warning:
                self.warnings.append(warning)
                logger.warning("%s", warning)
        self._logged_step = self.state.global_step
        return metrics

    def _show_completion(self) -> None:
        if self.args.log_completions and self.student_text is not None and self.student_text.last is not None:
            last, self.student_text.last = self.student_text.last, None
            ids = (last.prompt.token_ids, last.completion.token_ids)
            prompt, completion = (self.processing_class.decode(each) for each in ids)
            logger.info("Step %d, row %d: %r → %r", last.step + 1, last.prompt.sample + 1, prompt, completion)

    # ---- evaluation ----------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out measures (`speckd.evaluate`) and the objective's own loss, each row counted once over all processes."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            found: dict[str, float] = {}
            for name, own in dataset.items():
                found |= self.evaluate(own, ignore_keys, f"{metric_key_prefix}_{name}")
            return found
        if dataset is None:
            raise DataError("there is no held-out data to evaluate on", "Give eval_dataset")
        if SAMPLE not in dataset.column_names:
            dataset = self._prepare_dataset(dataset, self.processing_class, self.args, False, None, metric_key_prefix)
            if self.source is not None:
                require_known_tokens(dataset, self.vocabulary, metric_key_prefix)
        trained_on = self.source.positions.clone() if isinstance(self.source, ModelSource) else None
        self._move()
        sums, loss = self.held_out(dataset)
        if isinstance(self.source, ModelSource) and trained_on is not None:
            self.source.positions = trained_on  # what is logged is training's
        metrics = {"loss": float(loss[0] / loss[1])} if loss[1] else {}
        metrics |= sums.result(None if self.source is None else self.source.capabilities)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        if self.student_text is not None and self.student_text.adaptive is not None and "eval_loss" in metrics:
            self.student_text.adaptive.hear(metrics["eval_loss"])
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def held_out(self, dataset: Dataset) -> tuple[HeldOutSums, Tensor]:
        """Sums and loss over prepared rows: every process measures its own; all make the same number of forward calls."""
        training, world, size = self.model.training, self.accelerator.num_processes, self.args.per_device_eval_batch_size
        self.model.eval()
        own = list(range(self.accelerator.process_index, len(dataset), world))
        batches = [own[i : i + size] for i in range(0, len(own), size)]
        steps = math.ceil(len(dataset) / (size * world))
        self.callback_handler.eval_dataloader = range(steps)
        sums, loss = HeldOutSums(), torch.zeros(2, dtype=torch.float64)
        for step in range(steps):
            chosen = batches[step] if step < len(batches) else [0]
            inputs = self._prepare_inputs(self.data_collator([dataset[i] for i in chosen]))
            if step >= len(batches):
                inputs["labels"] = torch.full_like(inputs["labels"], -100)  # only to keep in step with the others
            self._settle_held_out(inputs)
            loss += self._measure_batch(sums, inputs)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.model.train(training)
        gathered = self.accelerator.reduce(torch.cat([sums.tensor(), loss]).to(self.accelerator.device), "sum").cpu()
        return HeldOutSums.of(gathered[:-2]), gathered[-2:]

    def _settle_held_out(self, inputs: dict[str, Any]) -> None:
        if isinstance(self.source, ServedSource):  # no other can be lost
            lost = self._settle([self._question(inputs, self._rows(inputs, self.vocabulary))])
            losers = self.accelerator.reduce(torch.tensor(int(lost is not None), device=self.accelerator.device), "sum")
            self._stop_where_lost(lost, int(losers))

    def _measure_batch(self, sums: HeldOutSums, inputs: dict[str, Any]) -> Tensor:
        held_out = self._rows(inputs, self.vocabulary)
        pending = self._ask(inputs, held_out)
        student = self.student
        with self.accelerator.autocast():
            hidden = student.get_decoder()(**_model_inputs(inputs), use_cache=False).last_hidden_state.flatten(0, 1)
            head = LMHead.from_model(student)
            teacher = self._answers(pending, inputs, reliable=True)
            known = Capabilities() if self.source is None else self.source.capabilities
            measure(sums, hidden, self.vocabulary.restrict(head), teacher, held_out, known)
            needed, axis = (teacher if self.objective.needs_teacher else None), self._training_vocabulary
            rows = self._rows(inputs, axis)
            asked = self._ask_reference(inputs, rows)
            third = None if asked is None else asked.rows()
            own = axis.restrict(head)
            output = distillation_loss(self.objective, hidden, own, needed, rows, *self._how, third, self._gather)
        return torch.stack([output.sum, output.count]).double().cpu()


def _require_shares(args: SpecKDConfig, names: list[str]) -> None:
    """Refuses several teachers of whom nobody says who teaches what, and the saying so without them."""
    given = [key for key in ("teacher_route_column", "teacher_mixture") if getattr(args, key) is not None]
    if names and not given:
        raise ConfigError("there are several teachers", "Set teacher_route_column, or teacher_mixture")
    if given and not names:
        raise ConfigError(f"{given[0]} is set, but there are no teachers by name", "Pass a mapping as teacher_model")
    if names and args.teacher_mixture is not None:
        require_weights(names, args.teacher_mixture)


def _refuse_unasked(writer: Writer | None, args: SpecKDConfig) -> None:
    if writer is not None and not args.writes:
        raise ConfigError(
            "a writer is given, but with sequence_source: dataset nobody asks it", "Set sequence_source: student, or such"
        )


def _require_reference(objective: Objective, reference: Any) -> None:
    if objective.needs_reference and reference is None:
        raise ConfigError(
            "the gate compares the student with a reference model, and none is given", "Set reference_model_name_or_path"
        )


def _model_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """What a model's forward takes."""
    return {name: value for name, value in inputs.items() if name not in _NOT_FOR_THE_MODEL}
