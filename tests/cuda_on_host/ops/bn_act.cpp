#include "../../../csrc/cuda/bn_act.cuh"

#include "entry.h"

SIM_ENTRY(bn_act_forward, BnActParams, bn_act_forward_workspace(p))
SIM_ENTRY(bn_act_backward, BnActParams, bn_act_backward_workspace(p))
