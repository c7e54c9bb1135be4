//! The traits that a plugin in Rust implements: [`Plugin`], and [`Checkpointer`], [`Notifier`] or both.

use crate::abi::{self, FermataBytes, FermataHostV1};
use crate::message::{Artifact, CallError, Description, RestoreReply, RestoreRequest, SaveRequest};
use serde_json::Value;

/// A plugin: its description, construction and capabilities.
///
/// The host makes one call at a time; it may call [`Plugin::cancel`] from another thread during a call.
pub trait Plugin: Sized + Send + Sync + 'static {
    /// Describes the plugin; called before any instance exists.
    fn describe() -> Description;

    /// Creates an instance. `settings` is a JSON object, empty when none are configured.
    fn create(settings: Value, host: Host) -> Result<Self, CallError>;

    /// Returns the implementation of checkpoint artifacts, if the plugin has one.
    fn checkpointer(&self) -> Option<&dyn Checkpointer> {
        None
    }

    /// Returns the implementation of notifications, if the plugin has one.
    fn notifier(&self) -> Option<&dyn Notifier> {
        None
    }

    /// Asks the current call to return soon; must not block. [`Host::cancelled`] is already true.
    fn cancel(&self) {}
}

/// Adds artifacts to checkpoints.
pub trait Checkpointer {
    /// Writes files into `request.directory` and returns them.
    fn save(&self, request: &SaveRequest) -> Result<Vec<Artifact>, CallError>;

    /// Restores what [`Checkpointer::save`] has written.
    fn restore(&self, _request: &RestoreRequest) -> Result<RestoreReply, CallError> {
        Err(CallError::unsupported("checkpoint.restore"))
    }
}

/// Delivers notifications.
pub trait Notifier {
    /// Delivers one event.
    fn notify(&self, event: &Value) -> Result<(), CallError>;
}

/// The severity of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    /// An operation failed.
    Error,
    /// A problem that does not prevent the operation.
    Warn,
    /// A notable event.
    Info,
    /// Details for debugging.
    Debug,
}

impl LogLevel {
    /// Returns the number in the ABI.
    pub fn number(self) -> u32 {
        match self {
            LogLevel::Error => abi::LEVEL_ERROR,
            LogLevel::Warn => abi::LEVEL_WARN,
            LogLevel::Info => abi::LEVEL_INFO,
            LogLevel::Debug => abi::LEVEL_DEBUG,
        }
    }

    /// Returns the level with this number; unknown numbers are [`LogLevel::Debug`].
    pub fn from_number(number: u32) -> Self {
        match number {
            abi::LEVEL_ERROR => LogLevel::Error,
            abi::LEVEL_WARN => LogLevel::Warn,
            abi::LEVEL_INFO => LogLevel::Info,
            _ => LogLevel::Debug,
        }
    }
}

/// The functions of the host that a plugin may call, from any thread. Cheap to copy.
#[derive(Clone, Copy)]
pub struct Host {
    table: Option<FermataHostV1>,
}

// SAFETY: the ABI promises that the host's functions may be called from any thread with the
// context, which Rust code here only ever hands back to them.
unsafe impl Send for Host {}
// SAFETY: as above.
unsafe impl Sync for Host {}

impl Host {
    /// Creates a host that logs nothing and never cancels, for tests of a plugin.
    pub fn detached() -> Self {
        Self { table: None }
    }

    /// Wraps the table that `create` received.
    ///
    /// # Safety
    /// `table` must be null or point to a host table that outlives the instance of the plugin.
    pub(crate) unsafe fn from_raw(table: *const FermataHostV1) -> Self {
        // SAFETY: by the contract of this function it is null or a table, and tables begin with their size.
        let table = unsafe { abi::copy_table(table) }.map(|(_, table)| table);
        Self { table }
    }

    /// Writes a line to the log of the daemon.
    pub fn log(&self, level: LogLevel, message: &str) {
        if let Some(table) = &self.table
            && let Some(log) = table.log
        {
            // SAFETY: the table is valid for the lifetime of the instance; the bytes outlive the call.
            unsafe {
                log(table.context, level.number(), FermataBytes::lend(message.as_bytes()));
            }
        }
    }

    /// Logs at level [`LogLevel::Info`].
    pub fn info(&self, message: &str) {
        self.log(LogLevel::Info, message);
    }

    /// Logs at level [`LogLevel::Warn`].
    pub fn warn(&self, message: &str) {
        self.log(LogLevel::Warn, message);
    }

    /// Says whether the host has cancelled the current call, which should then return soon.
    pub fn cancelled(&self) -> bool {
        match &self.table {
            Some(table) => table.cancelled.is_some_and(|cancelled| {
                // SAFETY: the table is valid for the lifetime of the instance.
                unsafe { cancelled(table.context) != 0 }
            }),
            None => false,
        }
    }
}
