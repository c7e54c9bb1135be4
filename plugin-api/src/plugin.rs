//! What a Rust author implements: [`Plugin`], and [`Checkpointer`] or [`Notifier`] or both.

use crate::abi::{self, FermataBytes, FermataHostV1};
use crate::message::{Artifact, Description, Failure, RestoreReply, RestoreRequest, SaveRequest};
use serde_json::Value;

/// A plugin: how it is described and made, and what it offers.
///
/// Calls come one at a time; [`Plugin::cancel`] may come from another thread while one runs.
pub trait Plugin: Sized + Send + Sync + 'static {
    /// Says who this is, before any instance exists.
    fn describe() -> Description;

    /// Makes an instance from its settings (a JSON object, empty when there are none).
    fn create(settings: Value, host: Host) -> Result<Self, Failure>;

    /// The side that adds artifacts to checkpoints, if there is one.
    fn checkpointer(&self) -> Option<&dyn Checkpointer> {
        None
    }

    /// The side that delivers notifications, if there is one.
    fn notifier(&self) -> Option<&dyn Notifier> {
        None
    }

    /// Asks the running call to return soon; must not block. [`Host::cancelled`] is already true.
    fn cancel(&self) {}
}

/// Adds artifacts to checkpoints.
pub trait Checkpointer {
    /// Writes files into `request.directory` and names them.
    fn save(&self, request: &SaveRequest) -> Result<Vec<Artifact>, Failure>;

    /// Brings back what [`Checkpointer::save`] has written.
    fn restore(&self, _request: &RestoreRequest) -> Result<RestoreReply, Failure> {
        Err(Failure::unsupported("checkpoint.restore"))
    }
}

/// Delivers notifications.
pub trait Notifier {
    /// Delivers one event.
    fn notify(&self, event: &Value) -> Result<(), Failure>;
}

/// How much a log line matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Something failed.
    Error,
    /// Something looks wrong.
    Warn,
    /// Something worth knowing happened.
    Info,
    /// Detail for whoever looks for a fault.
    Debug,
}

impl Level {
    /// The number in the ABI.
    pub fn number(self) -> u32 {
        match self {
            Level::Error => abi::LEVEL_ERROR,
            Level::Warn => abi::LEVEL_WARN,
            Level::Info => abi::LEVEL_INFO,
            Level::Debug => abi::LEVEL_DEBUG,
        }
    }

    /// The level with this number; a number from the future is detail.
    pub fn from_number(number: u32) -> Self {
        match number {
            abi::LEVEL_ERROR => Level::Error,
            abi::LEVEL_WARN => Level::Warn,
            abi::LEVEL_INFO => Level::Info,
            _ => Level::Debug,
        }
    }
}

/// The host, as a plugin sees it. Cheap to copy, usable from any thread.
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
    /// A host that logs nothing and cancels nothing, for an author's own tests.
    pub fn detached() -> Self {
        Self { table: None }
    }

    /// Takes over the table that `create` received.
    ///
    /// # Safety
    /// `table` must be null or a host's table that outlives the plugin's instance.
    pub(crate) unsafe fn from_raw(table: *const FermataHostV1) -> Self {
        // SAFETY: by this function's contract it is a table, and tables begin with their size.
        let table = unsafe { abi::copy_table(table) }.map(|(_, table)| table);
        Self { table }
    }

    /// Writes a line to the daemon's log.
    pub fn log(&self, level: Level, message: &str) {
        if let Some(table) = &self.table
            && let Some(log) = table.log
        {
            // SAFETY: the table is valid for the instance's life; the bytes outlive the call.
            unsafe {
                log(table.context, level.number(), FermataBytes::lend(message.as_bytes()));
            }
        }
    }

    /// Logs something worth knowing.
    pub fn info(&self, message: &str) {
        self.log(Level::Info, message);
    }

    /// Logs something that looks wrong.
    pub fn warn(&self, message: &str) {
        self.log(Level::Warn, message);
    }

    /// Says whether the current call should be given up soon.
    pub fn cancelled(&self) -> bool {
        match &self.table {
            Some(table) => table.cancelled.is_some_and(|cancelled| {
                // SAFETY: the table is valid for the instance's life.
                unsafe { cancelled(table.context) != 0 }
            }),
            None => false,
        }
    }
}
