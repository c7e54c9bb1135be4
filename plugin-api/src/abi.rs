//! The layouts and constants of ABI version 1, each described once.
//!
//! The macros below generate both the `#[repr(C)]` type and the description from which [`crate::header`] renders the C
//! header, so the two agree; `tests/header.rs` compares sizes and offsets with those of a C compiler.
//!
//! Nothing here may be reordered, renamed or removed. New fields are added at the end of a table; readers check its `size`.

use std::ffi::c_void;

/// The name of the symbol that a plugin exports: a [`PluginEntry`].
pub const SYMBOL: &str = "fermata_plugin_v1";

/// The major version of this ABI; an incompatible one has another [`SYMBOL`].
pub const VERSION: u32 = 1;

/// The maximum size of a reply in bytes; the host discards a longer one and reports an error.
pub const MAX_REPLY_BYTES: usize = 16 * 1024 * 1024 - 4096;

/// A structure of the C header.
#[derive(Debug, Clone, Copy)]
pub struct CStruct {
    /// The name in C and Rust.
    pub name: &'static str,
    /// The lines of the comment.
    pub docs: &'static [&'static str],
    /// `sizeof`, in bytes.
    pub size: usize,
    /// Alignment, in bytes.
    pub align: usize,
    /// The fields, in order.
    pub fields: &'static [CField],
}

/// A field of a [`CStruct`].
#[derive(Debug, Clone, Copy)]
pub struct CField {
    /// The name in C and Rust.
    pub name: &'static str,
    /// The declaration in C, without the semicolon.
    pub declaration: &'static str,
    /// The lines of the comment.
    pub docs: &'static [&'static str],
    /// `offsetof`, in bytes.
    pub offset: usize,
}

/// A constant of the C header.
#[derive(Debug, Clone, Copy)]
pub struct CConstant {
    /// The name in C.
    pub name: &'static str,
    /// The value.
    pub value: i64,
    /// The text of the comment.
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
    /// Success; the reply is the result.
    STATUS_OK = 0 as "FERMATA_OK",
    /// Failure; the reply is {"code", "message", "hint"?}.
    STATUS_ERROR = 1 as "FERMATA_ERROR",
    /// The plugin, or its configuration, does not support this method; not an error.
    STATUS_UNSUPPORTED = 2 as "FERMATA_UNSUPPORTED",
    /// Cancelled by the host.
    STATUS_CANCELLED = 3 as "FERMATA_CANCELLED",
    /// The plugin panicked; the reply may be as for FERMATA_ERROR.
    STATUS_PANIC = 4 as "FERMATA_PANIC",
} }

c_constants! { LEVELS: u32 {
    /// An operation failed.
    LEVEL_ERROR = 1 as "FERMATA_LOG_ERROR",
    /// A problem that does not prevent the operation.
    LEVEL_WARN = 2 as "FERMATA_LOG_WARN",
    /// A notable event.
    LEVEL_INFO = 3 as "FERMATA_LOG_INFO",
    /// Details for debugging.
    LEVEL_DEBUG = 4 as "FERMATA_LOG_DEBUG",
} }

c_struct! { BYTES
    /// Borrowed bytes: UTF-8 JSON or text, not terminated by a zero byte.
    /// `ptr` may be null when `len` is 0.
    pub struct FermataBytes {
        /// The first byte.
        pub ptr: *const u8 = "const uint8_t *ptr",
        /// The number of bytes.
        pub len: usize = "size_t len",
    }
}

c_struct! { HOST
    /// The functions of the host. The table outlives every instance that was created with it.
    /// All functions may be called from any thread; none keeps the bytes that it receives.
    pub struct FermataHostV1 {
        /// The size of this table in the version of the host, in bytes.
        pub size: usize = "size_t size",
        /// The first argument of each function.
        pub context: *mut c_void = "void *context",
        /// Writes a line to the log of the daemon; level is one of FERMATA_LOG_*.
        pub log: Option<unsafe extern "C" fn(*mut c_void, u32, FermataBytes)>
            = "void (*log)(void *context, uint32_t level, FermataBytes message)",
        /// Returns 1 when the current call was cancelled and should return soon, else 0.
        pub cancelled: Option<unsafe extern "C" fn(*mut c_void) -> u32>
            = "uint32_t (*cancelled)(void *context)",
    }
}

c_struct! { PLUGIN
    /// The functions of a plugin: fermata_plugin_v1 returns a pointer to this table, which must
    /// stay valid until the process exits (a plugin is never unloaded).
    ///
    /// Each function returns one of FERMATA_OK … FERMATA_PANIC. Bytes written to `*reply` belong
    /// to the plugin, and the host returns them through `free`; bytes that the plugin receives
    /// belong to the host and are valid during the call only. No exception or panic may leave a
    /// function.
    ///
    /// `call` and `destroy` of one instance never overlap; `cancel` may be called from another
    /// thread during a `call`.
    pub struct FermataPluginV1 {
        /// The size of this table in the version of the plugin, in bytes.
        pub size: usize = "size_t size",
        /// {"name", "version", "kind": ["checkpoint", "notify"], "settings"?: JSON schema}.
        pub describe: Option<unsafe extern "C" fn(*mut FermataBytes) -> i32>
            = "int32_t (*describe)(FermataBytes *reply)",
        /// Creates an instance from its settings (a JSON object); `*reply` gets the error, if any.
        pub create: Option<unsafe extern "C" fn(
                FermataBytes, *const FermataHostV1, *mut *mut c_void, *mut FermataBytes) -> i32>
            = "int32_t (*create)(FermataBytes settings, const FermataHostV1 *host, void **instance, FermataBytes *reply)",
        /// Runs a method: "checkpoint.save", "checkpoint.restore" or "notify"; others return
        /// FERMATA_UNSUPPORTED. Unknown members of a request must be ignored.
        pub call: Option<unsafe extern "C" fn(
                *mut c_void, FermataBytes, FermataBytes, *mut FermataBytes) -> i32>
            = "int32_t (*call)(void *instance, FermataBytes method, FermataBytes request, FermataBytes *reply)",
        /// Asks the current call to return soon. Must not block.
        pub cancel: Option<unsafe extern "C" fn(*mut c_void)>
            = "void (*cancel)(void *instance)",
        /// Destroys an instance.
        pub destroy: Option<unsafe extern "C" fn(*mut c_void)>
            = "void (*destroy)(void *instance)",
        /// Frees bytes that the plugin wrote to a `*reply`.
        pub free: Option<unsafe extern "C" fn(*mut u8, usize)>
            = "void (*free)(uint8_t *ptr, size_t len)",
    }
}

/// All structures of the header, in the order in which C needs them.
pub const STRUCTS: &[CStruct] = &[BYTES, HOST, PLUGIN];

/// The type of the symbol [`SYMBOL`].
pub type PluginEntry = unsafe extern "C" fn() -> *const FermataPluginV1;

impl FermataBytes {
    /// No bytes; the initial value of a reply.
    pub const EMPTY: Self = Self { ptr: std::ptr::null(), len: 0 };

    /// Borrows `bytes` for the other side; the result is valid as long as `bytes` is.
    pub fn lend(bytes: &[u8]) -> Self {
        Self { ptr: bytes.as_ptr(), len: bytes.len() }
    }

    /// Returns the bytes; `None` for a null pointer with a length, or a length beyond `isize::MAX`.
    ///
    /// # Safety
    /// `ptr` must be null or point to `len` readable bytes that are not modified during `'a`.
    pub unsafe fn view<'a>(self) -> Option<&'a [u8]> {
        if self.len == 0 {
            return Some(&[]);
        }
        if self.ptr.is_null() || self.len > isize::MAX as usize {
            return None;
        }
        // SAFETY: not null and not too long; the caller guarantees the rest.
        Some(unsafe { std::slice::from_raw_parts(self.ptr, self.len) })
    }
}

/// Copies the part of a table that both sides know; fields that the other side lacks stay zero (`None`).
///
/// # Safety
/// `table` must be null or point to a `T`, or to a shorter or longer version of it, which begins with its size in bytes
/// as a `usize`. `T` must be a table of this module: all zeroes is a valid value.
pub(crate) unsafe fn copy_table<T: Copy>(table: *const T) -> Option<(usize, T)> {
    if table.is_null() || !table.is_aligned() {
        return None;
    }
    // SAFETY: every version of a table begins with its size.
    let size = unsafe { table.cast::<usize>().read() };
    let mut copy = std::mem::MaybeUninit::<T>::zeroed();
    // SAFETY: both sides have at least the smaller of the two sizes and do not overlap, and zeroes are valid for the
    // fields that are not copied.
    let copy = unsafe {
        std::ptr::copy_nonoverlapping(table.cast::<u8>(), copy.as_mut_ptr().cast::<u8>(), size.min(size_of::<T>()));
        copy.assume_init()
    };
    Some((size, copy))
}
