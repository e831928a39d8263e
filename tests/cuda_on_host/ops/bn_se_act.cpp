#include "../../../csrc/cuda/bn_se_act.cuh"

#include "entry.h"

SIM_ENTRY(bn_se_act_forward, BnSeActParams, bn_se_act_forward_workspace(p))
SIM_ENTRY(bn_se_act_backward, BnSeActParams, bn_se_act_backward_workspace(p))
