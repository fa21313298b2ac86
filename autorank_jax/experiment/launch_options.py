"""Options of where a command runs; `launch` does what they say."""

import dataclasses

from autorank_jax.experiment.mistakes import ConfigurationError, outside


@dataclasses.dataclass(frozen=True)
class Launch:
    """Devices and processes of a run.

    Attributes:
        devices: devices of every process, 0 = all; on a CPU one virtual device per core
        distributed: be one of many processes, all started with the same options
        coordinator: HOST:PORT of process 0; Slurm, Kubernetes and Cloud TPU need none of these three
        num_processes: how many processes there are
        process_id: number of this one, from 0; process 0 shows progress and writes the files
    """

    devices: int = 0
    distributed: bool = False
    coordinator: str = ""
    num_processes: int | None = None
    process_id: int | None = None

    def validate(self) -> None:
        """Check every option.

        Raises:
            ConfigurationError: naming all mistakes, one per line.
        """
        problems = [*outside("devices", self.devices, 0, whole=True)]
        given = [self.coordinator != "", self.num_processes is not None, self.process_id is not None]
        if any(given) and not self.distributed:
            problems.append("coordinator, num-processes, process-id: expected only with --distributed")
        if any(given) and not all(given):
            problems.append("coordinator, num-processes, process-id: expected all three or none, got some of them")
        if self.num_processes is not None:
            problems += outside("num_processes", self.num_processes, 1, whole=True)
            if self.process_id is not None:
                problems += outside("process_id", self.process_id, 0, self.num_processes - 1, whole=True)
        if problems:
            raise ConfigurationError(problems)
