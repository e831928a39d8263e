#include "../../../csrc/cuda/conv_stats.cuh"

#include "../../../csrc/cuda/conv_sm90.cu"
#include "entry.h"

SIM_ENTRY(conv_stats_forward, ConvStatsParams, conv_stats_forward_workspace(p))
