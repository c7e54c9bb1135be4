//! Handlers of the methods `project.*` that end with one transaction.

use fermata_core::command::Command;
use fermata_core::view;
use fermata_protocol::ProjectName;
use fermata_protocol::project::{ProjectCreate, ProjectDetail, ProjectListResult, ProjectSet, ProjectView};
use serde_json::{Value, json};

use super::loads;
use super::reply::wire;
use crate::errors::Failure;
use crate::project::{ProjectHandle, Projects, Tell};
use crate::services::now;
use crate::store::idempotency::Keyed;
use crate::store::{checkpoints, context};

pub(super) async fn create(projects: &Projects, params: ProjectCreate, keyed: Option<Keyed>) -> Result<Value, Failure> {
    projects.create(params, keyed, |project| json!(view::project(project, now()))).await
}

pub(super) async fn set(projects: &Projects, params: ProjectSet, keyed: Option<Keyed>) -> Result<Value, Failure> {
    let ProjectSet { project, description, phase, config } = params;
    projects
        .get(&project)?
        .tell(Tell {
            command: Command::Set { description, phase, config },
            writes: Vec::new(),
            tokens: Vec::new(),
            keyed,
            view: Box::new(|project, _| json!(view::project(project, now()))),
        })
        .await
}

/// Adds the state that is not in the database.
fn with_daemon_state(handle: &ProjectHandle, view: ProjectView) -> ProjectView {
    ProjectView { disk_bytes: Some(handle.disk_bytes()), look: handle.scan_under_way(), ..view }
}

pub(super) fn list(projects: &Projects) -> Result<Value, Failure> {
    let now = now();
    let shown = |handle: &ProjectHandle| with_daemon_state(handle, view::project(&handle.project(), now));
    let views = projects.all().iter().map(shown).collect();
    wire(&ProjectListResult { projects: views })
}

pub(super) async fn show(projects: &Projects, name: &ProjectName) -> Result<Value, Failure> {
    let handle = projects.get(name)?;
    let project = handle.project();
    let name = name.clone();
    let (context, count, last) = projects
        .services()
        .store
        .read(move |connection| {
            let last = checkpoints::list(connection, &name, None, 1)?.pop();
            Ok((context::summary(connection, &name)?, checkpoints::count(connection, &name)?, last))
        })
        .await
        .map_err(|e| Failure::fault("read the project", &e))?;
    let mut agents: Vec<_> = project.agents.values().map(|agent| view::agent(&project, agent, now())).collect();
    loads::fill(projects.services(), &[&project], &mut agents).await;
    wire(&ProjectDetail {
        project: with_daemon_state(&handle, view::project(&project, now())),
        config: project.facts.config.clone(),
        agents,
        operation: view::operation(&project),
        last_checkpoint: last,
        checkpoints: count,
        context,
    })
}
