// The engines for sm_90a, or what stands for them in emulation.
#pragma once

#ifdef HPK_EMULATED
#include "emulation/gradient_sm90.h"
#include "emulation/strip_sm90.h"
#else
#include "common/gradient_sm90.cuh"
#include "common/strip_sm90.cuh"
#endif
