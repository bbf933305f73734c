"""The `launch` group."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .strict import Count, Strict


class LocalConfig(Strict):
    """Workers on this machine, by torchrun (ddp, fsdp) or the deepspeed launcher (zero*); one worker needs neither."""

    name: Literal["local"]
    workers_per_node: Count | Literal["auto"] = Field("auto", description="`auto`: one a GPU; 2 on a CPU machine.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(0, description="Rendezvous port; 0 takes a free one.")


class HostfileConfig(Strict):
    """Workers on the hosts of a DeepSpeed hostfile, over ssh or pdsh."""

    name: Literal["deepspeed"]
    hostfile: str = Field(description="Lines of `HOST slots=N`.")
    nodes: Count | None = Field(None, description="The first so many hosts; all if not given.")
    workers_per_node: Count | None = Field(None, description="Workers on each host; its slots if not given.")
    master_addr: str | None = Field(None, description="Address of the first host; looked up there if not given.")
    master_port: Annotated[int, Field(ge=1, le=65535)] = 29500


class SlurmConfig(Strict):
    """A SLURM job: one task a worker."""

    name: Literal["slurm"]
    nodes: Count = 1
    workers_per_node: Count = Field(description="Workers, and GPUs unless gpus_per_node says otherwise, on a node.")
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    cpus_per_task: Count | None = None
    mem: str | None = Field(None, description="Memory a node, in SLURM's words (`64G`).")
    time: str | None = Field(None, description="Time limit, in SLURM's words (`2-00:00:00`).")
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    master_port: Annotated[int, Field(ge=1, le=65535)] = 29500
    setup: list[str] = Field(default_factory=list, description="Shell lines before the workers start (module load …).")
    sbatch: dict[str, str] = Field(default_factory=dict, description="Any other sbatch option: long name → value.")


LaunchConfig = Annotated[LocalConfig | HostfileConfig | SlurmConfig, Field(discriminator="name")]
