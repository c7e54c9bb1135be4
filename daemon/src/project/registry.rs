//! The registry of projects: creates, finds and removes them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use fermata_core::command::Command;
use fermata_core::{Project, apply};
use fermata_protocol::event::Event;
use fermata_protocol::project::ProjectCreate;
use fermata_protocol::{AgentName, Code, ProjectName, Refusal, Target};
use serde_json::{Value, json};

use super::actor::Actor;
use super::handle::ProjectHandle;
use super::message::{Tell, View};
use crate::errors::Failure;
use crate::operations::blocking;
use crate::operations::maintenance::leftovers;
use crate::operations::pause::validate;
use crate::services::{self, Services};
use crate::store::commit::{Commit, Written};
use crate::store::idempotency::Keyed;
use crate::store::{Durability, checkpoints};
use fermata_os::process;

/// All projects by name.
pub struct Projects {
    services: Arc<Services>,
    by_name: RwLock<BTreeMap<ProjectName, ProjectHandle>>,
    /// Held across awaits on purpose: from the check of a name to the commit (or the removal of the actor) no other
    /// project may be created or removed. It delays only other creations and removals, by two transactions and a check
    /// of directories; reads of the registry do not take it.
    changing: tokio::sync::Mutex<()>,
}

impl Projects {
    pub fn new(services: Arc<Services>) -> Self {
        Self { services, by_name: RwLock::default(), changing: tokio::sync::Mutex::new(()) }
    }

    pub fn services(&self) -> &Arc<Services> {
        &self.services
    }

    /// Spawns an actor and registers its handle.
    pub fn start(&self, actor: Actor, handle: ProjectHandle) {
        let name = handle.name();
        self.services.tracker.spawn(actor.run());
        self.by_name.write().unwrap_or_else(PoisonError::into_inner).insert(name, handle);
    }

    /// Returns every project, sorted by name.
    pub fn all(&self) -> Vec<ProjectHandle> {
        self.by_name.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Finds a project.
    ///
    /// # Errors
    /// `project_not_found`.
    pub fn get(&self, name: &ProjectName) -> Result<ProjectHandle, Failure> {
        let handle = self.by_name.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned();
        handle.ok_or_else(|| {
            Refusal::new(Code::ProjectNotFound, format!("there is no project '{name}'"))
                .hint("fermatactl project ls")
                .into()
        })
    }

    /// Creates a project.
    ///
    /// # Errors
    /// `project_exists`, `workspace_refused`, or the store fails.
    pub async fn create(
        &self,
        params: ProjectCreate,
        keyed: Option<Keyed>,
        view: impl FnOnce(&Project) -> Value + Send + 'static,
    ) -> Result<Value, Failure> {
        let _changing = self.changing.lock().await;
        if self.get(&params.name).is_ok() {
            return Err(Refusal::new(Code::ProjectExists, format!("project '{}' exists already", params.name))
                .hint(format!("fermatactl project show {}", params.name))
                .into());
        }
        let workspace = params.workspace.clone();
        let (state, runtime) = (self.services.paths.state.clone(), self.services.paths.runtime.clone());
        let resolved = blocking("check the workspace", move || {
            validate::check_workspace(Path::new(&workspace))?;
            validate::check_overlap(Path::new(&workspace), &[&state, &runtime])?;
            // Resolved once: a symbolic link that is changed later must not move the project.
            std::fs::canonicalize(&workspace).map_err(|e| Failure::fault("resolve the workspace", &e))
        })
        .await?;
        let Some(workspace) = resolved.to_str() else {
            return Err(Refusal::new(
                Code::WorkspaceRefused,
                format!("the workspace {} has a path that is not UTF-8", resolved.display()),
            )
            .into());
        };
        let event = Event::ProjectCreated {
            workspace: workspace.to_owned(),
            description: params.description,
            source: params.source,
            config: params.config.unwrap_or_default(),
        };
        self.set_earlier_files_aside(&params.name).await?;
        let now = services::now();
        let Some(project) = apply::create(&params.name, &event, now) else {
            return Err(Refusal::new(Code::InternalError, "the first event did not create the project").into());
        };
        let created = Arc::new(project.clone());
        let commit = Commit {
            project: params.name.clone(),
            before: None,
            after: Some(Arc::clone(&created)),
            events: vec![event],
            writes: Vec::new(),
            keyed: keyed.map(|keyed| (keyed, None)),
            reply: Some(Box::new(move |_| view(&created))),
            result: None,
            only_before: None,
            now,
            durability: Durability::Power,
        };
        let written =
            self.services.store.commit(commit).await.map_err(|e| Failure::fault("save the new project", &e))?;
        let (actor, handle) = Actor::new(Arc::clone(&self.services), project);
        self.start(actor, handle);
        Ok(written.reply.unwrap_or(Value::Null))
    }

    /// Renames the directory of an earlier project of this name that the database does not contain, since the new
    /// project numbers its checkpoints from 1.
    async fn set_earlier_files_aside(&self, name: &ProjectName) -> Result<(), Failure> {
        let dir = self.services.project_dirs(name).root;
        blocking("check for files of an earlier project", move || {
            let mut aside = dir.clone().into_os_string();
            aside.push(format!(".unknown-{}", fermata_os::clock::unix_ms()));
            match std::fs::rename(&dir, &aside) {
                Ok(()) => {
                    tracing::warn!(renamed_to = ?aside, "found files of a project that the database does not contain")
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(Failure::fault(&format!("rename {}", dir.display()), &error)),
            }
            Ok(())
        })
        .await
    }

    /// Removes a project with its checkpoints and files; its workspace is not touched.
    ///
    /// # Errors
    /// Agents run, or checkpoints would be lost without `with_checkpoints`, or the store fails.
    pub async fn remove(
        &self,
        name: &ProjectName,
        with_checkpoints: bool,
        keyed: Option<Keyed>,
    ) -> Result<Value, Failure> {
        let changing = self.changing.lock().await;
        let handle = self.get(name)?;
        let project = name.clone();
        let count = self
            .services
            .store
            .read(move |connection| checkpoints::count(connection, &project))
            .await
            .map_err(|e| Failure::fault("count checkpoints", &e))?;
        let view: View = Box::new(|_: &Project, _: &Written| json!({}));
        let command = Command::Remove { checkpoints: count, with_checkpoints };
        let reply = handle.tell(Tell { command, writes: Vec::new(), tokens: Vec::new(), keyed, view }).await?;
        self.by_name.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        let dir = self.services.project_dirs(name).root;
        let aside = blocking("remove the project's files", move || {
            leftovers::defer_removal(&dir).map_err(|e| Failure::fault(&format!("remove {}", dir.display()), &e))
        })
        .await?;
        // In the tracker, since the caller may vanish. The name can be used again before all files are removed.
        let removal = self.services.tracker.spawn_blocking(move || leftovers::remove_deferred(aside));
        drop(changing);
        removal.await.map_err(|e| Failure::fault("remove the project's files", &e))?;
        Ok(reply)
    }

    /// Finds the agent whose current run has a token with this hash.
    pub fn agent_with_token(&self, token_sha256: &str) -> Option<Target> {
        self.find_agent(|agent| !agent.is_terminal() && agent.run().is_some_and(|run| run.token_sha256 == token_sha256))
    }

    /// Finds the agent whose main process or shim is one of these processes.
    pub fn agent_of_processes(&self, pids: &[i32]) -> Option<Target> {
        self.find_agent(|agent| {
            let processes = agent.run().and_then(|run| run.processes.as_ref());
            processes.is_some_and(|p| pids.contains(&p.pid) || pids.contains(&p.shim_pid))
        })
    }

    /// Finds the agent whose run is being started by one of these processes.
    ///
    /// An agent may call before its start was reported and persisted. Its shim is recognised by its program and by the
    /// run directory in its arguments.
    pub fn agent_of_shims(&self, pids: &[i32]) -> Option<Target> {
        let starting = |agent: &fermata_core::agent::Agent| {
            !agent.is_terminal() && agent.run().is_some_and(|run| run.processes.is_none())
        };
        self.find_agent(starting)?;
        let shim = std::fs::canonicalize(&self.services.programs.shim).ok()?;
        let is_shim = |pid: &&i32| process::program(**pid).is_ok_and(|program| program == shim);
        let run_dirs: Vec<PathBuf> = pids
            .iter()
            .filter(is_shim)
            .filter_map(|pid| process::first_argument(*pid).ok()?)
            .map(PathBuf::from)
            .collect();
        self.all().into_iter().find_map(|handle| {
            let project = handle.project();
            let dirs = self.services.project_dirs(&project.name);
            let is_meant = |agent: &&Arc<fermata_core::agent::Agent>| {
                agent.run().is_some_and(|run| run_dirs.contains(&dirs.run(&agent.name, &run.id)))
            };
            let name = project.agents.values().find(is_meant)?.name.clone();
            Some(Target::agent(project.name.clone(), name))
        })
    }

    fn find_agent(&self, wanted: impl Fn(&fermata_core::agent::Agent) -> bool) -> Option<Target> {
        self.all().into_iter().find_map(|handle| {
            let project = handle.project();
            let name: AgentName = project.agents.values().find(|agent| wanted(agent))?.name.clone();
            Some(Target::agent(project.name.clone(), name))
        })
    }

    /// Shuts every actor down, side by side.
    pub async fn shut_down(&self) {
        let each = self.all().into_iter().map(|handle| async move { handle.shut_down().await });
        drop(crate::operations::side_by_side(each.collect::<Vec<_>>()).await);
    }
}
