#include "../../../csrc/cuda/conv_bn_act.cuh"

#include "../../../csrc/cuda/conv_sm90.cu"
#include "entry.h"

SIM_ENTRY(conv_bn_act_forward, ConvBnActParams, 0)
