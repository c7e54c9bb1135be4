//! Handlers of `plugin.*`.

use std::path::Path;

use fermata_protocol::plugin::{PluginCheckResult, PluginEnable, PluginListResult, PluginState, PluginView};
use fermata_protocol::{Code, Refusal, UnixMillis};
use serde_json::Value;

use super::reply::wire;
use crate::errors::Failure;
use crate::plugins::{self, PluginError, PluginKind, PluginStatus};
use crate::project::Projects;

pub(super) fn list(projects: &Projects) -> Result<Value, Failure> {
    let plugins = projects.services().plugins.list().into_iter().map(view).collect();
    wire(&PluginListResult { plugins })
}

fn view(status: PluginStatus) -> PluginView {
    PluginView {
        name: status.name,
        path: status.path.to_string_lossy().into_owned(),
        version: status.version,
        kinds: status.kinds.iter().map(kind).collect(),
        state: match status.state {
            plugins::HostState::Running => PluginState::Running,
            plugins::HostState::Starting => PluginState::Starting,
            plugins::HostState::Disabled => PluginState::Disabled,
            plugins::HostState::Quarantined => PluginState::Quarantined,
            plugins::HostState::Failed => PluginState::Failed,
        },
        restarts: status.restarts,
        calls: status.calls,
        last_error: status.last_error,
        since: UnixMillis(i64::try_from(status.since_ms).unwrap_or(i64::MAX)),
        pid: status.pid.and_then(|pid| i32::try_from(pid).ok()),
    }
}

fn kind(kind: &PluginKind) -> String {
    serde_json::to_value(kind).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

pub(super) async fn reload(projects: &Projects) -> Result<Value, Failure> {
    projects.services().plugins.reload().await.map_err(|e| Failure::fault("reload the plugins", &e))?;
    list(projects)
}

pub(super) async fn enable(projects: &Projects, params: &PluginEnable) -> Result<Value, Failure> {
    let plugins = &projects.services().plugins;
    let switched =
        if params.enabled { plugins.enable(&params.name).await } else { plugins.disable(&params.name).await };
    match switched {
        Ok(()) => list(projects),
        Err(PluginError::NoSuchPlugin { name }) => {
            Err(Refusal::new(Code::PluginNotFound, format!("there is no plugin '{name}'"))
                .hint("fermatactl plugin ls")
                .into())
        }
        Err(error) => Err(Failure::fault("switch the plugin", &error)),
    }
}

pub(super) async fn check(projects: &Projects, path: &str) -> Result<Value, Failure> {
    if !Path::new(path).is_absolute() {
        return Err(Refusal::new(Code::InvalidParams, format!("'path' is not absolute: {path}")).into());
    }
    match projects.services().plugins.check(Path::new(path)).await {
        Ok(description) => wire(&PluginCheckResult {
            name: description.name,
            version: description.version,
            kinds: description.kind.iter().map(kind).collect(),
        }),
        Err(failure) => Err(Refusal::new(Code::PluginFailed, failure.message).into()),
    }
}
