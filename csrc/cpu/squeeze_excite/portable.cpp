#include "../simd/region.h"
#include "squeeze_excite.h"
#include "../simd/vec_portable.h"
#include "../simd/activation.h"
#include "../simd/part.h"
#include "../simd/element.h"
#include "../simd/mask.h"
#include "generic.h"
const fb::squeeze_excite::Table fb::squeeze_excite::kPortable = FB_SQUEEZE_EXCITE_KERNELS;
