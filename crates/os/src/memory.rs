//! Takes little memory from the system, and gives back what is not used.

/// From how many bytes on a block is mapped by itself, and so unmapped when it is freed.
#[cfg(target_env = "gnu")]
const MAPPED_BYTES: libc::c_int = 128 << 10;

/// Tells the allocator to share a few arenas among all threads. To be called before the first thread
/// starts.
///
/// glibc makes up to eight arenas for each processor, and what one of them has freed another does not
/// use: thirty threads that take turns with the same work keep thirty times its memory. It also
/// raises the size from which blocks are mapped by themselves whenever a larger one is freed
/// (mallopt(3)); a size that is set stays.
pub fn share_arenas() {
    #[cfg(target_env = "gnu")]
    {
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
        let arenas = libc::c_int::try_from(processors.max(2)).unwrap_or(libc::c_int::MAX);
        // SAFETY: mallopt(3) takes no pointer; there is one thread yet.
        unsafe {
            libc::mallopt(libc::M_ARENA_MAX, arenas);
            libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES);
        }
    }
}

/// Returns freed memory to the kernel.
///
/// The allocator keeps what a scan of a large workspace has freed, in an arena for each thread
/// that took part: hundreds of megabytes that nobody uses.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) takes no pointer and is thread-safe; it only releases free pages.
    unsafe {
        libc::malloc_trim(0);
    }
}
