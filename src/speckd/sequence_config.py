"""The settings that say where the text comes from that is trained on."""

from dataclasses import dataclass, field, replace

from speckd.config import REJECTED, Options, build, mapping, named_divergence, nearest
from speckd.errors import ConfigError
from speckd.objective import Objective
from speckd.own_writer import require_writer_class
from speckd.policies import Label
from speckd.sequence_kl import SequenceReverseKL
from speckd.sources.mixture import Mixture
from speckd.sources.writer import Sampling
from speckd.trust_gates import Trust

#: Whose words are trained on.
SOURCES = ("dataset", "student", "replay", "paired", "interleaved", "mixed")
#: What servers can write, given the student's weights.
BY_SERVERS = ("student", "replay", "paired")
#: As one of the sources: a writer of the user's own.
OWN_WRITER = "FILE.py:NAME"
#: Settings with a default, and the sources that ask for them.
OF_SOURCES = {
    "on_policy_fraction": (*SOURCES[1:], OWN_WRITER),
    "replay_capacity": ("replay",),
    "interleaved_top_k": ("interleaved",),
    "interleaved_block": ("interleaved",),
    "teacher_mix": ("mixed",),
}

#: Who writes, where it is not the student alone.
_WRITERS = {"interleaved": "text by student and teacher in turn", "mixed": "text drawn from student and teacher mixed"}


@dataclass
class SequenceConfig:
    """Flat, as they stand in a YAML file."""

    sequence_source: str = field(
        default="dataset",
        metadata={
            "help": "whose completions are trained on: dataset; student (written anew in each step); replay (also those of "
            "earlier steps, DistiLLM); paired (the data's and, beside it, the student's, DistiLLM-2); interleaved (the "
            "student proposes each token, and the teacher replaces what is not in its top-K, SKD); mixed (each token is "
            "drawn from a mixture of teacher and student, MiniLLM); or FILE.py:NAME, a writer of your own"
        },
    )
    on_policy_fraction: float = field(default=1.0, metadata={"help": "share of the samples that the student writes"})
    on_policy_fraction_end: float | None = field(
        default=None, metadata={"help": "the share after the last step, reached linearly; by default it stays"}
    )
    adaptive_on_policy: bool = field(
        default=False, metadata={"help": "let the share grow by 0.1 whenever the held-out loss has risen by 0.1 (DistiLLM)"}
    )
    replay_capacity: int = field(default=1000, metadata={"help": "completions that are kept to be trained on again"})
    sampling_temperature: float = field(default=1.0, metadata={"help": "at which text is written; 0 is greedy"})
    sampling_top_k: int = field(default=0, metadata={"help": "write only with the so many most probable tokens; 0 is all"})
    sampling_top_p: float = field(
        default=1.0, metadata={"help": "write only with the tokens that make up this share; 1 is all"}
    )
    max_completion_length: int = field(default=256, metadata={"help": "tokens of a written completion, at most"})
    interleaved_top_k: int = field(
        default=25, metadata={"help": "of interleaved text: a proposal is kept among so many of the teacher's most probable"}
    )
    interleaved_block: int = field(
        default=5, metadata={"help": "tokens that are proposed before the teacher is asked; changes no text"}
    )
    teacher_mix: float = field(default=0.2, metadata={"help": "of mixed text: the teacher's share in every token's draw"})
    student_text_divergence: str | None = field(
        default=None, metadata={"help": "the divergence on text that the student wrote; by default, divergence"}
    )
    student_text_divergence_options: Options | None = field(
        default=None, metadata={"help": "its parameters, a mapping or JSON"}
    )
    student_text_rejected: str | None = field(
        default=None, metadata={"help": "what a rejected token of the student's own text gets; by default, rejected"}
    )
    collapse_threshold: float = field(
        default=0.9, metadata={"help": "stop when this share of the completions repeats itself, is empty, or ends no more"}
    )
    collapse_patience: int = field(default=50, metadata={"help": "over so many steps; 0 never stops"})
    student_server_urls: list[str] | None = field(
        default=None,
        metadata={
            "help": "vLLM servers that write the student's text; they are given its weights, as docs/teacher-text.md says"
        },
    )
    student_server_model: str | None = field(
        default=None, metadata={"help": "the served student's name; by default the only model that is served"}
    )
    student_server_max_staleness: int = field(
        default=0, metadata={"help": "optimizer steps that the servers' weights may be behind the student's"}
    )
    student_server_concurrency: int = field(default=32, metadata={"help": "requests at a time to one server of the student"})
    log_completions: bool = field(default=False, metadata={"help": "show one of the written completions with every log"})

    @property
    def writes(self) -> bool:
        """Is any text written in training?"""
        return self.sequence_source != "dataset"

    @property
    def own_writer(self) -> bool:
        """Does a class of the user's own write it?"""
        return ":" in self.sequence_source

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.sampling_temperature, self.sampling_top_k, self.sampling_top_p, self.max_completion_length)

    @property
    def described_source(self) -> str:
        """Whose text is trained on, for the line that describes a run."""
        if not self.writes:
            return "the data's text"
        end = "" if self.on_policy_fraction_end is None else f" to {self.on_policy_fraction_end:.0%}"
        beside = "beside" if self.sequence_source == "paired" else "in the place of"
        again = ", partly replayed" if self.sequence_source == "replay" else ""
        whose = _WRITERS.get(self.sequence_source, "the student's text")
        if self.own_writer:
            whose = f"text by {self.sequence_source}"
        if self.student_server_urls:
            whose += f" (by servers, with weights at most {self.student_server_max_staleness} steps old)"
        return f"{whose} {beside} the data's for {self.on_policy_fraction:.0%}{end} of the samples{again}"

    def mixture(self, seed: int) -> Mixture:
        return Mixture(seed, self.on_policy_fraction, self.on_policy_fraction_end)

    def student_text_objective(self, objective: Objective) -> Objective:
        """What is minimised on text that the student wrote, from what is minimised on the data's.

        There is no label there but the student's own token, of whose cross-entropy the mean gradient is 0: so the divergence
        takes the share that `label_loss_weight` has on the data's text.

        Raises:
            ConfigError: tokens would learn from a label that is the student's own.
        """
        found = replace(objective, label_loss_weight=0.0)
        if self.student_text_divergence is not None:
            key, options = "student_text_divergence", self.student_text_divergence_options
            found = replace(found, divergence=named_divergence(key, self.student_text_divergence, options))
        if self.student_text_rejected is not None:
            key = "student_text_rejected"
            found = replace(found, rejected=build(key, REJECTED, self.student_text_rejected, key, None))
        if isinstance(found.divergence, SequenceReverseKL):
            self._refuse_other_draws()
            if found.divergence.teacher_mix:
                raise ConfigError(
                    "student_text_divergence_options: teacher_mix is that of the text", "Set teacher_mix by itself"
                )
            share = self.teacher_mix if self.sequence_source == "mixed" else 0.0
            found = replace(found, divergence=replace(found.divergence, teacher_mix=share))
        if found.learns_labels and self.sequence_source not in _WRITERS:
            raise ConfigError(
                "label_nll: on text that the student writes, the label is its own token, which teaches nothing",
                "Set student_text_divergence: reverse_kl for example, or sequence_source: dataset",
            )
        if isinstance(getattr(found.gate, "gate", found.gate), Trust):
            raise ConfigError(
                "trust: it is read off labels, and on text that the student writes, the label is its own token, which nobody "
                "explains better: no teacher would be trusted",
                "Name another gate or recipe, such as ungated, or set sequence_source: dataset",
            )
        if isinstance(found.rejected, Label):
            raise ConfigError(
                "rejected: label: on text that the student writes, the label is its own token, and to learn that one where it "
                "was rejected leads away from the teacher",
                "Set student_text_rejected: residual, down_weight or mask, or name a recipe, such as ungated (where no method "
                "is named, rejected: label comes from the default recipe, label-ratio)",
            )
        return found

    def _refuse_other_draws(self) -> None:
        """A policy gradient is one of text as its policy writes it."""
        drawn = (self.sampling_temperature, self.sampling_top_k, self.sampling_top_p) == (1, 0, 1)
        if not drawn or self.sequence_source not in ("student", "paired", "mixed"):
            raise ConfigError(
                "sequence_reverse_kl is a policy gradient: its text must be drawn anew from the student as it is, or from its "
                "mixture with the teacher",
                "Set sequence_source: student, paired or mixed, sampling_temperature: 1, sampling_top_k: 0, sampling_top_p: 1",
            )

    def refuse_contradicting_sequences(self) -> None:
        """Within these settings; what the trainer's others have to do with them is checked where those are."""
        if self.own_writer:
            require_writer_class(self.sequence_source)
        elif self.sequence_source not in SOURCES:
            raise ConfigError(
                f"sequence_source: '{self.sequence_source}' is not one of its values",
                nearest(str(self.sequence_source), list(SOURCES)),
            )
        for key in ("on_policy_fraction", "on_policy_fraction_end", "teacher_mix"):
            share = getattr(self, key)
            if share is not None and not 0 <= share <= 1:
                raise ConfigError(f"{key} is {share}", "Give a share between 0 and 1")
        if not 0 < self.collapse_threshold <= 1 or self.collapse_patience < 0:
            raise ConfigError(
                f"collapse_threshold is {self.collapse_threshold} and collapse_patience {self.collapse_patience}",
                "Give a share above 0, up to 1, and a number of steps (0 switches the alarm off)",
            )
        for key, least in (("interleaved_top_k", 0), ("interleaved_block", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"{key} is {getattr(self, key)}", f"Use {least} or more")
        if self.replay_capacity < 1:
            raise ConfigError(f"replay_capacity is {self.replay_capacity}", "Keep at least 1 completion")
        self._refuse_contradicting_servers()
        self.sampling  # noqa: B018  (checks itself)
        mapping("student_text_divergence_options", self.student_text_divergence_options)
        if self.student_text_divergence_options is not None and self.student_text_divergence is None:
            raise ConfigError("student_text_divergence_options is set, but student_text_divergence is not", "Set both")
        of_written = ("student_text_divergence", "student_text_rejected", "on_policy_fraction_end")
        for key in of_written if not self.writes else ():
            if getattr(self, key) is not None:
                raise ConfigError(
                    f"{key} is set, but sequence_source is dataset: the student writes nothing",
                    f"Set sequence_source: student, or remove {key}",
                )
        if self.adaptive_on_policy and (not self.writes or self.on_policy_fraction_end is not None):
            raise ConfigError(
                "adaptive_on_policy moves on_policy_fraction with the held-out loss, which needs a sequence_source that writes "
                "and no on_policy_fraction_end",
                "Set sequence_source: replay and remove on_policy_fraction_end",
            )

    def _refuse_contradicting_servers(self) -> None:
        """Of those that write the student's text."""
        if self.student_server_max_staleness < 0:
            raise ConfigError(
                f"student_server_max_staleness is {self.student_server_max_staleness}", "Give a number of optimizer steps, or 0"
            )
        if self.student_server_concurrency < 1:
            raise ConfigError(f"student_server_concurrency is {self.student_server_concurrency}", "Give at least 1")
        if self.student_server_urls and self.sequence_source not in BY_SERVERS:
            raise ConfigError(
                f"student_server_urls is set, but with sequence_source: {self.sequence_source} servers write nothing",
                f"Set sequence_source: {', '.join(BY_SERVERS[:-1])} or {BY_SERVERS[-1]}, or remove student_server_urls",
            )
