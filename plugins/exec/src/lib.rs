//! The plugin `exec`: runs a configured program on events, or to write checkpoint artifacts.
//!
//! ```toml
//! [settings]
//! events = ["project.paused", "question.*"]      # default: all
//! notify = ["notify-send", "Fermata"]            # the event on stdin, FERMATA_EVENT is its name
//! checkpoint = ["pg_dump", "--file=dump.sql"]    # runs in the artifact directory
//! restore = ["psql", "--file=dump.sql"]          # runs there too, when a checkpoint is restored
//! timeout_ms = 20000
//! ```
//!
//! Programs are run without a shell, and variables are not expanded. Each program gets its request as JSON on stdin; its
//! output goes to the log of the daemon. `program` runs it, `settings` parses the table above, `artifacts` lists the
//! files that it has written.
#![cfg_attr(not(test), warn(clippy::wildcard_enum_match_arm))]

mod artifacts;
mod program;
mod settings;

use fermata_plugin_api::{
    Artifact, CallError, Checkpointer, Description, Host, Notifier, Plugin, PluginKind, RestoreReply, RestoreRequest,
    SaveRequest, event_matches, event_name, export_plugin,
};
use program::{Canceller, Invocation};
use serde_json::Value;
use settings::ExecSettings;
use std::time::Duration;

struct Exec {
    settings: ExecSettings,
    host: Host,
    canceller: Canceller,
}

impl Exec {
    /// The time limit of a program: that of the settings, or the deadline of the host if it is sooner.
    fn limit(&self, deadline_ms: Option<u64>) -> Duration {
        let own = self.settings.timeout_ms;
        Duration::from_millis(deadline_ms.map_or(own, |deadline| deadline.min(own)))
    }

    fn run(&self, program: Invocation<'_>) -> Result<(), CallError> {
        program.run(&self.canceller, &self.host)
    }
}

impl Plugin for Exec {
    fn describe() -> Description {
        Description {
            settings: Some(ExecSettings::schema()),
            ..Description::new("exec", env!("CARGO_PKG_VERSION"), [PluginKind::Checkpoint, PluginKind::Notify])
        }
    }

    fn create(settings: Value, host: Host) -> Result<Self, CallError> {
        Ok(Self { settings: ExecSettings::parse(settings)?, host, canceller: Canceller::default() })
    }

    fn checkpointer(&self) -> Option<&dyn Checkpointer> {
        Some(self)
    }

    fn notifier(&self) -> Option<&dyn Notifier> {
        Some(self)
    }

    fn cancel(&self) {
        self.canceller.cancel();
    }
}

impl Checkpointer for Exec {
    fn save(&self, request: &SaveRequest) -> Result<Vec<Artifact>, CallError> {
        let Some(argv) = &self.settings.checkpoint else {
            return Err(CallError::unsupported("checkpoint.save"));
        };
        let frozen = if request.frozen { "1" } else { "0" };
        self.run(Invocation {
            argv,
            directory: Some(&request.directory),
            input: json(request)?,
            environment: vec![
                ("FERMATA_PROJECT", request.project.as_ref()),
                ("FERMATA_CHECKPOINT", request.checkpoint.as_ref()),
                ("FERMATA_OPERATION", request.operation.as_ref()),
                ("FERMATA_WORKSPACE", request.workspace.as_ref()),
                ("FERMATA_DIRECTORY", request.directory.as_ref()),
                ("FERMATA_FROZEN", frozen.as_ref()),
            ],
            limit: self.limit(request.deadline_ms),
        })?;
        artifacts::list(&request.directory, &argv[0])
    }

    fn restore(&self, request: &RestoreRequest) -> Result<RestoreReply, CallError> {
        let Some(argv) = &self.settings.restore else {
            return Err(CallError::unsupported("checkpoint.restore"));
        };
        self.run(Invocation {
            argv,
            directory: Some(&request.directory),
            input: json(request)?,
            environment: vec![
                ("FERMATA_PROJECT", request.project.as_ref()),
                ("FERMATA_CHECKPOINT", request.checkpoint.as_ref()),
                ("FERMATA_OPERATION", request.operation.as_ref()),
                ("FERMATA_WORKSPACE", request.workspace.as_ref()),
                ("FERMATA_DIRECTORY", request.directory.as_ref()),
            ],
            limit: self.limit(request.deadline_ms),
        })?;
        Ok(RestoreReply::default())
    }
}

impl Notifier for Exec {
    fn notify(&self, event: &Value) -> Result<(), CallError> {
        let Some(argv) = &self.settings.notify else {
            return Err(CallError::unsupported("notify"));
        };
        let name = event_name(event).unwrap_or_default();
        if !event_matches(&self.settings.events, name) {
            return Ok(());
        }
        let mut environment = vec![("FERMATA_EVENT", name.as_ref())];
        if let Some(project) = event.get("project").and_then(Value::as_str) {
            environment.push(("FERMATA_PROJECT", project.as_ref()));
        }
        self.run(Invocation { argv, directory: None, input: json(event)?, environment, limit: self.limit(None) })
    }
}

fn json(value: &impl serde::Serialize) -> Result<Vec<u8>, CallError> {
    serde_json::to_vec(value).map_err(|error| CallError::new("encoding", error.to_string()))
}

export_plugin!(Exec);
