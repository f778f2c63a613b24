"""The modules, under the names and with the constructors, parameters and state_dict of torch.nn."""

from bptoolkit.ops.activation import GELU as GELU
from bptoolkit.ops.activation import ReLU as ReLU
from bptoolkit.ops.activation import Sigmoid as Sigmoid
from bptoolkit.ops.activation import SiLU as SiLU
from bptoolkit.ops.activation import Tanh as Tanh
from bptoolkit.ops.conv import Conv1d as Conv1d
from bptoolkit.ops.conv import Conv2d as Conv2d
from bptoolkit.ops.conv import Conv3d as Conv3d
from bptoolkit.ops.conv_transpose import ConvTranspose1d as ConvTranspose1d
from bptoolkit.ops.conv_transpose import ConvTranspose2d as ConvTranspose2d
from bptoolkit.ops.conv_transpose import ConvTranspose3d as ConvTranspose3d
from bptoolkit.ops.cross_entropy import CrossEntropyLoss as CrossEntropyLoss
from bptoolkit.ops.fold import Fold as Fold
from bptoolkit.ops.fold import Unfold as Unfold
from bptoolkit.ops.gru import GRU as GRU
from bptoolkit.ops.layer_norm import LayerNorm as LayerNorm
from bptoolkit.ops.linear import Linear as Linear
from bptoolkit.ops.lstm import LSTM as LSTM
from bptoolkit.ops.mse_loss import MSELoss as MSELoss
from bptoolkit.ops.multihead_attention import MultiheadAttention as MultiheadAttention
from bptoolkit.ops.pixel_shuffle import ChannelShuffle as ChannelShuffle
from bptoolkit.ops.pixel_shuffle import PixelShuffle as PixelShuffle
from bptoolkit.ops.pixel_shuffle import PixelUnshuffle as PixelUnshuffle
from bptoolkit.ops.rnn import RNN as RNN
from bptoolkit.ops.softmax import LogSoftmax as LogSoftmax
from bptoolkit.ops.softmax import Softmax as Softmax
