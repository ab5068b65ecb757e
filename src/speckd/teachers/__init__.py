"""Where the teacher's signal comes from. Each source answers for indices into a flattened batch (`types.TeacherRows`)."""

from speckd.teachers.in_process import DenseTeacher, HiddenTeacher, TopKTeacher
from speckd.teachers.unreliable import ScrambledTeacher

__all__ = ["DenseTeacher", "HiddenTeacher", "ScrambledTeacher", "TopKTeacher"]
