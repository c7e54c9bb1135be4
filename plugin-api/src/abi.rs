//! The layouts and numbers of ABI version 1, each described exactly once.
//!
//! The macros below turn one description into the `#[repr(C)]` type and into the table that
//! [`crate::header`] renders the C header from; so the two cannot drift apart unnoticed, and
//! `tests/header.rs` asks a C compiler about the rest.
//!
//! Nothing here may be reordered, renamed or removed. New fields go to the end of a table, and
//! whoever reads a table looks at its `size` first.

use std::ffi::c_void;

/// Name of the one symbol that a plugin exports: a [`PluginEntry`].
pub const SYMBOL: &str = "fermata_plugin_v1";

/// Major version of this ABI; an incompatible one would have another [`SYMBOL`].
pub const VERSION: u32 = 1;

/// Most bytes that one reply may have; the host discards a longer one and reports an error.
pub const MAX_REPLY_BYTES: usize = 16 * 1024 * 1024 - 4096;

/// A C structure as the header shows it.
#[derive(Debug, Clone, Copy)]
pub struct CStruct {
    /// Name in C and in Rust.
    pub name: &'static str,
    /// Lines of documentation.
    pub docs: &'static [&'static str],
    /// `sizeof`, in bytes.
    pub size: usize,
    /// Alignment, in bytes.
    pub align: usize,
    /// The fields in their order.
    pub fields: &'static [CField],
}

/// One field of a [`CStruct`].
#[derive(Debug, Clone, Copy)]
pub struct CField {
    /// Name in C and in Rust.
    pub name: &'static str,
    /// The declaration in C, without the semicolon.
    pub declaration: &'static str,
    /// Lines of documentation.
    pub docs: &'static [&'static str],
    /// `offsetof`, in bytes.
    pub offset: usize,
}

/// One named number of the header.
#[derive(Debug, Clone, Copy)]
pub struct CConstant {
    /// Name in C.
    pub name: &'static str,
    /// Its value.
    pub value: i64,
    /// What it means.
    pub docs: &'static str,
}

macro_rules! c_struct {
    (
        $table:ident
        $(#[doc = $doc:literal])*
        pub struct $name:ident {
            $( $(#[doc = $field_doc:literal])* pub $field:ident : $ty:ty = $c:literal, )*
        }
    ) => {
        $(#[doc = $doc])*
        #[repr(C)]
        #[derive(Clone, Copy)]
        pub struct $name {
            $( $(#[doc = $field_doc])* pub $field: $ty, )*
        }

        const $table: CStruct = CStruct {
            name: stringify!($name),
            docs: &[$($doc),*],
            size: size_of::<$name>(),
            align: align_of::<$name>(),
            fields: &[$( CField {
                name: stringify!($field),
                declaration: $c,
                docs: &[$($field_doc),*],
                offset: std::mem::offset_of!($name, $field),
            } ),*],
        };
    };
}

macro_rules! c_constants {
    ($table:ident : $ty:ty { $( #[doc = $doc:literal] $rust:ident = $value:literal as $c:literal, )* }) => {
        $( #[doc = $doc] pub const $rust: $ty = $value; )*
        pub(crate) const $table: &[CConstant] =
            &[$( CConstant { name: $c, value: $value, docs: $doc } ),*];
    };
}

c_constants! { STATUSES: i32 {
    /// Done; the reply holds the result.
    STATUS_OK = 0 as "FERMATA_OK",
    /// Failed; the reply holds {"code", "message", "hint"?}.
    STATUS_ERROR = 1 as "FERMATA_ERROR",
    /// The plugin does not know this method, or its settings leave it out; not an error.
    STATUS_UNSUPPORTED = 2 as "FERMATA_UNSUPPORTED",
    /// Given up because the host asked for it.
    STATUS_CANCELLED = 3 as "FERMATA_CANCELLED",
    /// The plugin panicked inside; the reply may say more, as for FERMATA_ERROR.
    STATUS_PANIC = 4 as "FERMATA_PANIC",
} }

c_constants! { LEVELS: u32 {
    /// Something failed.
    LEVEL_ERROR = 1 as "FERMATA_LOG_ERROR",
    /// Something looks wrong.
    LEVEL_WARN = 2 as "FERMATA_LOG_WARN",
    /// Something worth knowing happened.
    LEVEL_INFO = 3 as "FERMATA_LOG_INFO",
    /// Detail for whoever looks for a fault.
    LEVEL_DEBUG = 4 as "FERMATA_LOG_DEBUG",
} }

c_struct! { BYTES
    /// Bytes that someone else owns: UTF-8 JSON or text, not terminated by a zero.
    /// `ptr` may be null when `len` is 0.
    pub struct FermataBytes {
        /// First byte.
        pub ptr: *const u8 = "const uint8_t *ptr",
        /// Number of bytes.
        pub len: usize = "size_t len",
    }
}

c_struct! { HOST
    /// What the host offers to a plugin. It outlives every instance that was created with it.
    /// All functions may be called from any thread, none of them keeps the bytes it is given.
    pub struct FermataHostV1 {
        /// Size of this table in bytes, as the host knows it.
        pub size: usize = "size_t size",
        /// To be handed back as the first argument of each function.
        pub context: *mut c_void = "void *context",
        /// Writes a line to the daemon's log; level is one of FERMATA_LOG_*.
        pub log: Option<unsafe extern "C" fn(*mut c_void, u32, FermataBytes)>
            = "void (*log)(void *context, uint32_t level, FermataBytes message)",
        /// Says (1 or 0) whether the current call should be given up soon.
        pub cancelled: Option<unsafe extern "C" fn(*mut c_void) -> u32>
            = "uint32_t (*cancelled)(void *context)",
    }
}

c_struct! { PLUGIN
    /// What a plugin exports: the function fermata_plugin_v1 returns a pointer to one of these,
    /// which stays valid until the process ends (a plugin is never unloaded).
    ///
    /// Each function returns one of FERMATA_OK … FERMATA_PANIC. Bytes put into `*reply` belong to
    /// the plugin and are given back through `free`; bytes that it receives belong to the host
    /// and are valid during the call only. No exception and no panic may leave a function.
    ///
    /// `call` and `destroy` of one instance never overlap; `cancel` may come from another thread
    /// while a `call` runs.
    pub struct FermataPluginV1 {
        /// Size of this table in bytes, as the plugin knows it.
        pub size: usize = "size_t size",
        /// {"name", "version", "kind": ["checkpoint", "notify"], "settings"?: JSON schema}.
        pub describe: Option<unsafe extern "C" fn(*mut FermataBytes) -> i32>
            = "int32_t (*describe)(FermataBytes *reply)",
        /// Makes an instance from its settings (a JSON object); `*reply` gets the error if any.
        pub create: Option<unsafe extern "C" fn(
                FermataBytes, *const FermataHostV1, *mut *mut c_void, *mut FermataBytes) -> i32>
            = "int32_t (*create)(FermataBytes settings, const FermataHostV1 *host, void **instance, FermataBytes *reply)",
        /// Runs a method: "checkpoint.save", "checkpoint.restore" or "notify"; others are
        /// FERMATA_UNSUPPORTED. Unknown members of a request are to be ignored.
        pub call: Option<unsafe extern "C" fn(
                *mut c_void, FermataBytes, FermataBytes, *mut FermataBytes) -> i32>
            = "int32_t (*call)(void *instance, FermataBytes method, FermataBytes request, FermataBytes *reply)",
        /// Asks a running call to return soon. Must not block.
        pub cancel: Option<unsafe extern "C" fn(*mut c_void)>
            = "void (*cancel)(void *instance)",
        /// Ends an instance.
        pub destroy: Option<unsafe extern "C" fn(*mut c_void)>
            = "void (*destroy)(void *instance)",
        /// Frees bytes that the plugin put into a `*reply`.
        pub free: Option<unsafe extern "C" fn(*mut u8, usize)>
            = "void (*free)(uint8_t *ptr, size_t len)",
    }
}

/// All structures of the header, in the order in which C wants to see them.
pub const STRUCTS: &[CStruct] = &[BYTES, HOST, PLUGIN];

/// The type of the symbol [`SYMBOL`].
pub type PluginEntry = unsafe extern "C" fn() -> *const FermataPluginV1;

impl FermataBytes {
    /// Bytes of length zero, for a reply that was not written.
    pub const EMPTY: Self = Self { ptr: std::ptr::null(), len: 0 };

    /// Lends `bytes` to the other side; the result is valid for as long as `bytes` is.
    pub fn lend(bytes: &[u8]) -> Self {
        Self { ptr: bytes.as_ptr(), len: bytes.len() }
    }

    /// Looks at the bytes; `None` for a null pointer with a length or a length beyond `isize`.
    ///
    /// # Safety
    /// `ptr` must be null or point to `len` readable bytes that nobody changes during `'a`.
    pub unsafe fn view<'a>(self) -> Option<&'a [u8]> {
        if self.len == 0 {
            return Some(&[]);
        }
        if self.ptr.is_null() || self.len > isize::MAX as usize {
            return None;
        }
        // SAFETY: not null, not too long, and the caller vouches for the rest.
        Some(unsafe { std::slice::from_raw_parts(self.ptr, self.len) })
    }
}

/// Copies the part of a table that both sides know; what the other side lacks stays zero (`None`).
///
/// # Safety
/// `table` must point to a `T` or to a shorter or longer version of it, which begins with its own
/// size in bytes as a `usize`. `T` must be a table of this module: all zeroes is a valid value.
pub(crate) unsafe fn copy_table<T: Copy>(table: *const T) -> Option<(usize, T)> {
    if table.is_null() || !table.is_aligned() {
        return None;
    }
    // SAFETY: every version of a table begins with its size.
    let size = unsafe { table.cast::<usize>().read() };
    let mut copy = std::mem::MaybeUninit::<T>::zeroed();
    // SAFETY: both sides have at least the smaller of the two sizes, they do not overlap, and
    // zeroes are valid for the fields that were not copied.
    let copy = unsafe {
        std::ptr::copy_nonoverlapping(table.cast::<u8>(), copy.as_mut_ptr().cast::<u8>(), size.min(size_of::<T>()));
        copy.assume_init()
    };
    Some((size, copy))
}
