# Sourced by scripts that train on CPUs for long: glibc gives large blocks back
# after each step and must fault them in again. Ignored by other allocators.
export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-2000000000}
export MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-268435456}
