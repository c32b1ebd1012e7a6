"""Tasks that are generated, none downloaded, for any model through any policy and storage."""

from attnspan.evaluation.tasks.base import DoesNotFit, Example, Probe, Task, Writer
from attnspan.evaluation.tasks.copying import Copy
from attnspan.evaluation.tasks.needle import Needle
from attnspan.evaluation.tasks.passkey import Passkey
from attnspan.evaluation.tasks.streameval import StreamEval
from attnspan.evaluation.tasks.streaming import StreamingNll
from attnspan.evaluation.tasks.tracing import VariableTracking
from attnspan.evaluation.tasks.words import CommonWords, FrequentWords

TASKS: dict[str, Task | StreamingNll] = {
    task.name: task
    for task in (
        StreamingNll(),
        Passkey(),
        Copy(),
        StreamEval(),
        Needle(),
        Needle("multi-key", keys=4, depths=None),
        Needle("multi-value", values=4, depths=None),
        Needle("multi-query", keys=8, queries=4, depths=None),
        VariableTracking(),
        CommonWords(),
        FrequentWords(),
    )
}
"""All of them, by name."""

__all__ = [
    "TASKS",
    "CommonWords",
    "Copy",
    "DoesNotFit",
    "Example",
    "FrequentWords",
    "Needle",
    "Passkey",
    "Probe",
    "StreamEval",
    "StreamingNll",
    "Task",
    "VariableTracking",
    "Writer",
]
