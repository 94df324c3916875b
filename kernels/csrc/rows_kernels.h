// The table of one instruction set's row kernels: a unit includes this and says COPD_ROWS(its name).
#pragma once

#include "rows_grad.h"
#include "rows_round.h"
#include "rows_stats.h"

#define COPD_ROWS(isa)                                                                                                 \
  const copd::RowKernels copd::rows_##isa = {#isa,        &prepare,      &single_stats,   &dual_stats,                 \
                                             &second,     &single_grad,  &dual_grad,      &topk,                       \
                                             &round_rows, &correct_rows, &correct_columns};
