"""What the forms of the deployments accept, beside the specification's own types.

Prefect's server checks a form before it makes a run, as far as a JSON schema can say what is wrong.
"""

import re
from typing import Annotated

from pydantic import Field

from tell_core.spec.arms import ARM_NAMES
from tell_core.spec.model import PositiveInt

_BLOCKS = "tell_blocks(k)"  # two blocks at least
_ARMS = [re.escape(name) for name in ARM_NAMES if name != _BLOCKS]
_ARM_PATTERN = "|".join([*_ARMS, r"tell_blocks\(([2-9]|[1-9][0-9]+)\)"])

ArmName = Annotated[str, Field(pattern=f"^({_ARM_PATTERN})$")]
Setting = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*=")]
RunnerName = Annotated[str, Field(pattern="^(local|(dask|ray)(=.+)?)$")]
ModelName = Annotated[str, Field(min_length=1)]
Version = PositiveInt
