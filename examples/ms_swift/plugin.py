"""For ``--external_plugins``: registers the optimizer ``gradreg`` with ms-swift."""

import gradreg_optim.integrations.ms_swift  # noqa: F401
