// The row kernels for AVX2 with FMA. CMake gives this file its flags; elsewhere it is empty.

#ifdef COPD_ROWS_AVX2
#include "rows_kernels.h"

COPD_ROWS(avx2)
#endif
