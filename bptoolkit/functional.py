"""The ops, under the names and with the signatures of torch.nn.functional."""

from bptoolkit.ops.activation import gelu as gelu
from bptoolkit.ops.activation import relu as relu
from bptoolkit.ops.activation import sigmoid as sigmoid
from bptoolkit.ops.activation import silu as silu
from bptoolkit.ops.activation import tanh as tanh
from bptoolkit.ops.attention import scaled_dot_product_attention as scaled_dot_product_attention
from bptoolkit.ops.conv import conv1d as conv1d
from bptoolkit.ops.conv import conv2d as conv2d
from bptoolkit.ops.conv import conv3d as conv3d
from bptoolkit.ops.cross_entropy import cross_entropy as cross_entropy
from bptoolkit.ops.gru import gru as gru
from bptoolkit.ops.layer_norm import layer_norm as layer_norm
from bptoolkit.ops.linear import linear as linear
from bptoolkit.ops.lstm import lstm as lstm
from bptoolkit.ops.mse_loss import mse_loss as mse_loss
from bptoolkit.ops.multihead_attention import multi_head_attention_forward as multi_head_attention_forward
from bptoolkit.ops.rnn import rnn as rnn
from bptoolkit.ops.softmax import log_softmax as log_softmax
from bptoolkit.ops.softmax import softmax as softmax
