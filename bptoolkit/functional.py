"""The ops, under the names and with the signatures of torch.nn.functional."""

from bptoolkit.ops.linear import linear as linear
