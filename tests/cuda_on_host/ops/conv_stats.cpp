#include "../../../csrc/cuda/conv_stats.cuh"

#include "entry.h"

SIM_ENTRY(conv_stats_forward, ConvStatsParams, conv_stats_forward_workspace(p))
