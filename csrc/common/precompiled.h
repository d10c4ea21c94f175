// What every source reads, compiled once for each variant (setup.py) and read before the source itself. Not for any `#include`.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <tuple>

#include "common/tensor.h"
