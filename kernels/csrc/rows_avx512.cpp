// The row kernels for AVX-512 (F, BW, VL, DQ). CMake gives this file its flags; elsewhere it is empty.

#ifdef COPD_ROWS_AVX512
#include "rows_kernels.h"

COPD_ROWS(avx512)
#endif
