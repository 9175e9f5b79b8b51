// The operand lists of wgmma's accumulators: their names in inline PTX, and their constraints, for 8 to 128 registers.
#pragma once

// clang-format off
#define LONGATTN_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LONGATTN_NAMES_16 LONGATTN_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LONGATTN_NAMES_24 LONGATTN_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define LONGATTN_NAMES_32 LONGATTN_NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define LONGATTN_NAMES_40 LONGATTN_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define LONGATTN_NAMES_48 LONGATTN_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define LONGATTN_NAMES_56 LONGATTN_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define LONGATTN_NAMES_64 LONGATTN_NAMES_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define LONGATTN_NAMES_72 LONGATTN_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define LONGATTN_NAMES_80 LONGATTN_NAMES_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define LONGATTN_NAMES_88 LONGATTN_NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define LONGATTN_NAMES_96 LONGATTN_NAMES_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define LONGATTN_NAMES_104 LONGATTN_NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define LONGATTN_NAMES_112 LONGATTN_NAMES_104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define LONGATTN_NAMES_120 LONGATTN_NAMES_112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define LONGATTN_NAMES_128 LONGATTN_NAMES_120 ", %120, %121, %122, %123, %124, %125, %126, %127"

#define LONGATTN_LIST_8(c, d, i) \
  c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define LONGATTN_LIST_OF_8(c, d) LONGATTN_LIST_8(c, d, 0)
#define LONGATTN_LIST_OF_16(c, d) LONGATTN_LIST_OF_8(c, d), LONGATTN_LIST_8(c, d, 8)
#define LONGATTN_LIST_OF_24(c, d) LONGATTN_LIST_OF_16(c, d), LONGATTN_LIST_8(c, d, 16)
#define LONGATTN_LIST_OF_32(c, d) LONGATTN_LIST_OF_24(c, d), LONGATTN_LIST_8(c, d, 24)
#define LONGATTN_LIST_OF_40(c, d) LONGATTN_LIST_OF_32(c, d), LONGATTN_LIST_8(c, d, 32)
#define LONGATTN_LIST_OF_48(c, d) LONGATTN_LIST_OF_40(c, d), LONGATTN_LIST_8(c, d, 40)
#define LONGATTN_LIST_OF_56(c, d) LONGATTN_LIST_OF_48(c, d), LONGATTN_LIST_8(c, d, 48)
#define LONGATTN_LIST_OF_64(c, d) LONGATTN_LIST_OF_56(c, d), LONGATTN_LIST_8(c, d, 56)
#define LONGATTN_LIST_OF_72(c, d) LONGATTN_LIST_OF_64(c, d), LONGATTN_LIST_8(c, d, 64)
#define LONGATTN_LIST_OF_80(c, d) LONGATTN_LIST_OF_72(c, d), LONGATTN_LIST_8(c, d, 72)
#define LONGATTN_LIST_OF_88(c, d) LONGATTN_LIST_OF_80(c, d), LONGATTN_LIST_8(c, d, 80)
#define LONGATTN_LIST_OF_96(c, d) LONGATTN_LIST_OF_88(c, d), LONGATTN_LIST_8(c, d, 88)
#define LONGATTN_LIST_OF_104(c, d) LONGATTN_LIST_OF_96(c, d), LONGATTN_LIST_8(c, d, 96)
#define LONGATTN_LIST_OF_112(c, d) LONGATTN_LIST_OF_104(c, d), LONGATTN_LIST_8(c, d, 104)
#define LONGATTN_LIST_OF_120(c, d) LONGATTN_LIST_OF_112(c, d), LONGATTN_LIST_8(c, d, 112)
#define LONGATTN_LIST_OF_128(c, d) LONGATTN_LIST_OF_120(c, d), LONGATTN_LIST_8(c, d, 120)
// clang-format on
