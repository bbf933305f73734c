"""The `launch` group."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .strict import Count, Strict, Text


class LocalConfig(Strict):
    """Workers on this machine, by torchrun (ddp, fsdp) or the deepspeed launcher (zero*); one worker needs neither."""

    name: Literal["local"]
    workers_per_node: Count | Literal["auto"] = Field("auto", description="`auto`: one per GPU, or 2 without GPUs.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(0, description="Rendezvous port; 0 chooses a free port.")


class HostfileConfig(Strict):
    """Workers on the hosts of a DeepSpeed hostfile, started over ssh or pdsh."""

    name: Literal["deepspeed"]
    hostfile: Text = Field(description="Path of a file with one line `HOST slots=N` per host.")
    nodes: Count | None = Field(None, description="Use only the first hosts of the file. Defaults to all.")
    workers_per_node: Count | None = Field(None, description="Workers per host. Defaults to the host's slots.")
    master_addr: str | None = Field(
        None, description="Address of the first host. By default it is looked up on that host."
    )
    master_port: Annotated[int, Field(ge=1, le=65535)] = 29500


class SlurmConfig(Strict):
    """A SLURM job with one task per worker, or one torchrun per node."""

    name: Literal["slurm"]
    nodes: Count = 1
    workers_per_node: Count = Field(description="Workers per node.")
    gpus_per_node: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Defaults to workers_per_node, or 0 if no node of the partition has GPUs."
    )
    cpus_per_task: Count | None = None
    mem: str | None = Field(None, description="Memory per node, in SLURM's format (`64G`).")
    time: str | Count | None = Field(
        None, description="Time limit, in SLURM's format (`2-00:00:00`); a number is one of minutes."
    )
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    master_port: Annotated[int, Field(ge=1, le=65535)] | Literal["auto"] = Field(
        "auto",
        description="Rendezvous port. `auto`: derived from the job's id, or the next free port of the first node.",
    )
    requeue: bool | Literal["auto"] = Field(
        "auto",
        description="Whether a job that was preempted, ran out of time or lost a node starts again and goes on. "
        "`auto`: yes, unless train.resume is set.",
    )
    tasks_per_node: Literal[1] | None = Field(
        None, description="1: one task per node, in which torchrun starts the workers. By default, a task per worker."
    )
    container: Text | None = Field(None, description="Image in which the workers run: a file, or a name in a registry.")
    container_runtime: Literal["pyxis", "apptainer"] = Field(
        "pyxis", description="What starts the container: srun with the plugin pyxis (Enroot), or Apptainer."
    )
    container_mounts: list[Text] = Field(
        default_factory=list,
        description="Paths of data, models and caches, as PATH, HOST_PATH:PATH or HOST_PATH:PATH:ro. The current "
        "folder and that of the run are always mounted.",
    )
    container_python: Text = Field("python3", description="Python of the workers inside the container.")
    site: Text | None = Field(
        None, description="Path of a YAML file with defaults of a site for keys of launch (partition, account, setup)."
    )
    template: Text | None = Field(
        None, description="Path of your own batch script with the placeholders of slurm/train.sbatch."
    )
    setup: list[str] = Field(
        default_factory=list, description="Shell lines to run before the workers (`module load …`)."
    )
    sbatch: dict[str, str] = Field(default_factory=dict, description="Further sbatch options: long name → value.")


LaunchConfig = Annotated[LocalConfig | HostfileConfig | SlurmConfig, Field(discriminator="name")]
