// Target regions: code between FB_BEGIN_TARGET and FB_END_TARGET is compiled for the named instruction set, whatever flags the
// file is built with. Files inside a region include <immintrin.h> and their own op only, and keep everything in anonymous
// namespaces: an inline function shared with other files could otherwise be kept in its AVX-512 form for everyone.
#pragma once

#include <cstdint>

#define FB_PRAGMA(x) _Pragma(#x)

#if defined(__clang__)
#define FB_BEGIN_TARGET(features) FB_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FB_END_TARGET FB_PRAGMA(clang attribute pop)
#else
#define FB_BEGIN_TARGET(features) FB_PRAGMA(GCC push_options) FB_PRAGMA(GCC target(features))
#define FB_END_TARGET FB_PRAGMA(GCC pop_options)
#endif

#define FB_INLINE inline __attribute__((always_inline))
