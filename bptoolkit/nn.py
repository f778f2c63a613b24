"""The modules, under the names and with the constructors, parameters and state_dict of torch.nn."""

from bptoolkit.ops.linear import Linear as Linear
