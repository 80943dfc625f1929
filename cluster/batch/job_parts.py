"""The parts of a job while it runs: those of an earlier run that are whole, and new ones."""

from dataclasses import dataclass, field

from shardline.cluster.batch.batch_job import BatchJob
from shardline.cluster.batch.part_files import OutputFolder
from shardline.cluster.batch.spans import Span, spans_of
from shardline.shards.core.files import FileEntry
from shardline.shards.core.progress import Progress

RESUME, SEARCH = "resume", "search"  # stages, for progress


@dataclass(slots=True)
class Parts:
    """The parts of a job so far, those of an earlier run among them; tells the progress."""

    job: BatchJob
    progress: Progress
    entries: dict[int, FileEntry] = field(default_factory=dict)
    rows: int = 0
    resumed: int = 0
    searched: int = 0

    def resume(self, output: OutputFolder) -> list[Span]:
        """Takes what is there and whole; the blocks that are left to do, in order."""
        spans = spans_of(self.job.rows, self.job.block_rows)
        for span, entry in output.kept(spans):
            self.add(span, entry)
            self.progress(RESUME, self.rows, self.job.rows)
        self.resumed = len(self.entries)
        return [span for span in spans if span.number not in self.entries]

    def add(self, span: Span, entry: FileEntry) -> None:
        self.entries[span.number] = entry
        self.rows += len(span)

    def begin(self) -> None:
        """Tells the progress that the search begins: its rate counts from here."""
        self.progress(SEARCH, self.rows, self.job.rows)

    def written(self, span: Span, entry: FileEntry) -> None:
        self.add(span, entry)
        self.searched += len(span)
        self.progress(SEARCH, self.rows, self.job.rows)

    @property
    def ordered(self) -> list[FileEntry]:
        return [self.entries[number] for number in sorted(self.entries)]
