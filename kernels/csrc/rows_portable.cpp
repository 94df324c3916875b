// The row kernels with the compiler's own baseline: vectors of four.

#include "rows_kernels.h"

COPD_ROWS(portable)
