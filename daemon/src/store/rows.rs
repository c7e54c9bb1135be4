//! The rows of projects, agents, tasks and questions.
//!
//! Saving compares the states before and after by pointer, so that only changed objects are written.

use std::collections::BTreeMap;
use std::sync::Arc;

use fermata_core::agent::Agent;
use fermata_core::project::{Counters, Project, ProjectFacts};
use fermata_protocol::project::WorkspaceSource;
use fermata_protocol::question::QuestionView;
use fermata_protocol::task::Phase;
use fermata_protocol::task::TaskView;
use fermata_protocol::{AgentName, ProjectName, UnixMillis};
use rusqlite::{Connection, OptionalExtension as _, Row, named_params, params};
use serde::de::DeserializeOwned;

use super::error::{Doing, StoreError};

const LOAD: &str = "load the projects";
const SAVE: &str = "save the project";

/// Loads every project.
///
/// # Errors
/// A row cannot be read.
pub fn load_all(connection: &Connection) -> Result<Vec<Project>, StoreError> {
    let mut statement = connection.prepare("SELECT name FROM projects ORDER BY name").doing(LOAD)?;
    let names: Vec<String> =
        statement.query_map([], |row| row.get(0)).doing(LOAD)?.collect::<Result<_, _>>().doing(LOAD)?;
    names.iter().map(|name| load(connection, name)).collect()
}

fn load(connection: &Connection, name: &str) -> Result<Project, StoreError> {
    let columns = "description, source_type, source_location, source_branch, workspace, phase, config, state, \
                   checkpointing, counters, total_paused_ms, created_at";
    let sql = format!("SELECT {columns} FROM projects WHERE name = ?1");
    let raw = connection.query_row(&sql, [name], raw_project).optional().doing(LOAD)?;
    let raw = raw.ok_or(rusqlite::Error::QueryReturnedNoRows).doing(LOAD)?;
    let source = match (raw.source_type, raw.source_location) {
        (Some(kind), Some(location)) => Some(WorkspaceSource { kind, location, branch: raw.source_branch }),
        (Some(_), None) | (None, _) => None,
    };
    let facts = ProjectFacts {
        workspace: raw.workspace,
        description: raw.description,
        source,
        config: json(&raw.config)?,
        phase: word::<Phase>(&raw.phase)?,
        created_at: UnixMillis(raw.created_at),
    };
    Ok(Project {
        name: word::<ProjectName>(name)?,
        facts: Arc::new(facts),
        state: Arc::new(json(&raw.state)?),
        checkpointing: raw.checkpointing.as_deref().map(json).transpose()?.map(Arc::new),
        counters: json::<Counters>(&raw.counters)?,
        total_paused_ms: raw.total_paused_ms,
        agents: load_agents(connection, name)?,
        tasks: load_tasks(connection, name)?,
        questions: load_questions(connection, name)?,
    })
}

struct RawProject {
    description: String,
    source_type: Option<String>,
    source_location: Option<String>,
    source_branch: Option<String>,
    workspace: String,
    phase: String,
    config: String,
    state: String,
    checkpointing: Option<String>,
    counters: String,
    total_paused_ms: i64,
    created_at: i64,
}

fn raw_project(row: &Row<'_>) -> rusqlite::Result<RawProject> {
    Ok(RawProject {
        description: row.get(0)?,
        source_type: row.get(1)?,
        source_location: row.get(2)?,
        source_branch: row.get(3)?,
        workspace: row.get(4)?,
        phase: row.get(5)?,
        config: row.get(6)?,
        state: row.get(7)?,
        checkpointing: row.get(8)?,
        counters: row.get(9)?,
        total_paused_ms: row.get(10)?,
        created_at: row.get(11)?,
    })
}

fn load_agents(connection: &Connection, project: &str) -> Result<BTreeMap<AgentName, Arc<Agent>>, StoreError> {
    let mut statement = connection.prepare("SELECT data FROM agents WHERE project = ?1").doing(LOAD)?;
    let rows = statement.query_map([project], |row| row.get::<_, String>(0)).doing(LOAD)?;
    let mut agents = BTreeMap::new();
    for row in rows {
        let agent: Agent = json(&row.doing(LOAD)?)?;
        agents.insert(agent.name.clone(), Arc::new(agent));
    }
    Ok(agents)
}

/// Loads the tasks of a project, from the database or from a checkpoint's backup.
///
/// # Errors
/// A row cannot be read.
pub fn load_tasks(connection: &Connection, project: &str) -> Result<BTreeMap<u64, Arc<TaskView>>, StoreError> {
    let sql = "SELECT id, agent, title, status, percent, created_at, updated_at FROM tasks WHERE project = ?1";
    let mut statement = connection.prepare(sql).doing(LOAD)?;
    let mut rows = statement.query([project]).doing(LOAD)?;
    let mut tasks = BTreeMap::new();
    while let Some(row) = rows.next().doing(LOAD)? {
        let agent: Option<String> = row.get(1).doing(LOAD)?;
        let status: String = row.get(3).doing(LOAD)?;
        let task = TaskView {
            id: row.get::<_, i64>(0).doing(LOAD)?.unsigned_abs(),
            agent: agent.as_deref().map(word).transpose()?,
            title: row.get(2).doing(LOAD)?,
            status: word(&status)?,
            percent: row.get(4).doing(LOAD)?,
            created_at: UnixMillis(row.get(5).doing(LOAD)?),
            updated_at: UnixMillis(row.get(6).doing(LOAD)?),
        };
        tasks.insert(task.id, Arc::new(task));
    }
    Ok(tasks)
}

fn load_questions(connection: &Connection, project: &str) -> Result<BTreeMap<u64, Arc<QuestionView>>, StoreError> {
    let sql = "SELECT id, agent, text, choices, asked_at, answer, answered_at FROM questions WHERE project = ?1";
    let mut statement = connection.prepare(sql).doing(LOAD)?;
    let mut rows = statement.query([project]).doing(LOAD)?;
    let mut questions = BTreeMap::new();
    while let Some(row) = rows.next().doing(LOAD)? {
        let question = QuestionView {
            project: word(project)?,
            id: row.get::<_, i64>(0).doing(LOAD)?.unsigned_abs(),
            agent: word(&row.get::<_, String>(1).doing(LOAD)?)?,
            text: row.get(2).doing(LOAD)?,
            choices: json(&row.get::<_, String>(3).doing(LOAD)?)?,
            asked_at: UnixMillis(row.get(4).doing(LOAD)?),
            answer: row.get(5).doing(LOAD)?,
            answered_at: row.get::<_, Option<i64>>(6).doing(LOAD)?.map(UnixMillis),
        };
        questions.insert(question.id, Arc::new(question));
    }
    Ok(questions)
}

/// Writes the rows of the objects that differ between two states.
///
/// # Errors
/// A row cannot be written.
pub fn save(
    connection: &Connection,
    before: Option<&Project>,
    after: &Project,
    now: UnixMillis,
) -> Result<(), StoreError> {
    save_project(connection, after, now)?;
    let project = after.name.as_str();
    let unchanged = |old: Option<&Arc<Agent>>, new: &Arc<Agent>| old.is_some_and(|old| Arc::ptr_eq(old, new));
    for (name, agent) in &after.agents {
        let old = before.and_then(|before| before.agents.get(name));
        // The status in the row depends on the agent's questions too.
        let asked = before.is_some_and(|before| before.asks(name) != after.asks(name));
        if !unchanged(old, agent) || asked {
            save_agent(connection, after, agent, now)?;
        }
    }
    for (id, task) in &after.tasks {
        let old = before.and_then(|before| before.tasks.get(id));
        if !old.is_some_and(|old| Arc::ptr_eq(old, task)) {
            save_task(connection, project, task)?;
        }
    }
    for (id, question) in &after.questions {
        let old = before.and_then(|before| before.questions.get(id));
        if !old.is_some_and(|old| Arc::ptr_eq(old, question)) {
            save_question(connection, project, question)?;
        }
    }
    let Some(before) = before else { return Ok(()) };
    for name in before.agents.keys().filter(|name| !after.agents.contains_key(*name)) {
        for table in ["agents", "agent_environments", "agent_states"] {
            let column = if table == "agents" { "name" } else { "agent" };
            let sql = format!("DELETE FROM {table} WHERE project = ?1 AND {column} = ?2");
            connection.execute(&sql, [project, name.as_str()]).doing(SAVE)?;
        }
    }
    for id in before.tasks.keys().filter(|id| !after.tasks.contains_key(id)) {
        let sql = "DELETE FROM tasks WHERE project = ?1 AND id = ?2";
        connection.execute(sql, params![project, *id as i64]).doing(SAVE)?;
    }
    Ok(())
}

fn save_project(connection: &Connection, project: &Project, now: UnixMillis) -> Result<(), StoreError> {
    let facts = &project.facts;
    let source = facts.source.as_ref();
    let sql = "INSERT INTO projects (name, description, source_type, source_location, source_branch, workspace, \
               status, phase, config, state, checkpointing, counters, total_paused_ms, created_at, updated_at) \
               VALUES (:name, :description, :source_type, :source_location, :source_branch, :workspace, :status, \
               :phase, :config, :state, :checkpointing, :counters, :total_paused_ms, :created_at, :now) \
               ON CONFLICT (name) DO UPDATE SET description = :description, source_type = :source_type, \
               source_location = :source_location, source_branch = :source_branch, workspace = :workspace, \
               status = :status, phase = :phase, config = :config, state = :state, checkpointing = :checkpointing, \
               counters = :counters, total_paused_ms = :total_paused_ms, updated_at = :now";
    let checkpointing = project.checkpointing.as_ref().map(|run| text(&**run)).transpose()?;
    connection
        .prepare_cached(sql)
        .and_then(|mut statement| {
            statement.execute(named_params! {
                ":name": project.name.as_str(),
                ":description": facts.description,
                ":source_type": source.map(|s| &s.kind),
                ":source_location": source.map(|s| &s.location),
                ":source_branch": source.and_then(|s| s.branch.as_ref()),
                ":workspace": facts.workspace,
                ":status": project.state.status().as_str(),
                ":phase": facts.phase.as_str(),
                ":config": text(&facts.config).unwrap_or_default(),
                ":state": text(&*project.state).unwrap_or_default(),
                ":checkpointing": checkpointing,
                ":counters": text(&project.counters).unwrap_or_default(),
                ":total_paused_ms": project.total_paused_ms,
                ":created_at": facts.created_at.0,
                ":now": now.0,
            })
        })
        .doing(SAVE)?;
    Ok(())
}

fn save_agent(connection: &Connection, project: &Project, agent: &Agent, now: UnixMillis) -> Result<(), StoreError> {
    let sql = "INSERT INTO agents (project, name, status, data, created_at, updated_at) \
               VALUES (?1, ?2, ?3, ?4, ?5, ?6) \
               ON CONFLICT (project, name) DO UPDATE SET status = ?3, data = ?4, updated_at = ?6";
    let status = agent.status(project.asks(&agent.name)).as_str();
    let data = text(agent)?;
    connection
        .prepare_cached(sql)
        .and_then(|mut statement| {
            let name = (project.name.as_str(), agent.name.as_str());
            statement.execute(params![name.0, name.1, status, data, agent.created_at.0, now.0])
        })
        .doing("save the agent")?;
    Ok(())
}

fn save_task(connection: &Connection, project: &str, task: &TaskView) -> Result<(), StoreError> {
    let sql = "INSERT OR REPLACE INTO tasks (project, id, agent, title, status, percent, created_at, updated_at) \
               VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
    connection
        .prepare_cached(sql)
        .and_then(|mut statement| {
            statement.execute(params![
                project,
                task.id as i64,
                task.agent.as_ref().map(AgentName::as_str),
                task.title,
                task.status.as_str(),
                task.percent,
                task.created_at.0,
                task.updated_at.0,
            ])
        })
        .doing("save the task")?;
    Ok(())
}

fn save_question(connection: &Connection, project: &str, question: &QuestionView) -> Result<(), StoreError> {
    let sql = "INSERT OR REPLACE INTO questions (project, id, agent, text, choices, asked_at, answer, answered_at) \
               VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
    let choices = text(&question.choices)?;
    connection
        .prepare_cached(sql)
        .and_then(|mut statement| {
            statement.execute(params![
                project,
                question.id as i64,
                question.agent.as_str(),
                question.text,
                choices,
                question.asked_at.0,
                question.answer,
                question.answered_at.map(|at| at.0),
            ])
        })
        .doing("save the question")?;
    Ok(())
}

/// Removes the rows of a project, except its events and operations.
///
/// # Errors
/// A row cannot be removed.
pub fn remove(connection: &Connection, project: &ProjectName) -> Result<(), StoreError> {
    let what = "remove the project";
    let name = project.as_str();
    let search = "DELETE FROM context_search WHERE rowid IN (SELECT id FROM context_items WHERE project = ?1)";
    connection.execute(search, [name]).doing(what)?;
    for table in ["agents", "agent_environments", "agent_states", "tasks", "questions", "context_items", "checkpoints"]
    {
        connection.execute(&format!("DELETE FROM {table} WHERE project = ?1"), [name]).doing(what)?;
    }
    connection.execute("DELETE FROM projects WHERE name = ?1", [name]).doing(what)?;
    Ok(())
}

/// Writes the environment of an agent.
///
/// # Errors
/// The row cannot be written.
pub fn save_environment(
    connection: &Connection,
    project: &ProjectName,
    agent: &AgentName,
    env: &BTreeMap<String, String>,
) -> Result<(), StoreError> {
    let sql = "INSERT OR REPLACE INTO agent_environments (project, agent, env) VALUES (?1, ?2, ?3)";
    let env = text(env)?;
    connection.execute(sql, [project.as_str(), agent.as_str(), &env]).doing("save the environment")?;
    Ok(())
}

/// Reads the environment of an agent; empty when there is none.
///
/// # Errors
/// The row cannot be read.
pub fn load_environment(
    connection: &Connection,
    project: &ProjectName,
    agent: &AgentName,
) -> Result<BTreeMap<String, String>, StoreError> {
    let sql = "SELECT env FROM agent_environments WHERE project = ?1 AND agent = ?2";
    let env: Option<String> = connection
        .query_row(sql, [project.as_str(), agent.as_str()], |row| row.get(0))
        .optional()
        .doing("load the environment")?;
    env.as_deref().map_or_else(|| Ok(BTreeMap::new()), json)
}

/// Writes the state that an agent has saved.
///
/// # Errors
/// The row cannot be written.
pub fn save_agent_state(
    connection: &Connection,
    project: &ProjectName,
    agent: &AgentName,
    state: &str,
    now: UnixMillis,
) -> Result<(), StoreError> {
    let sql = "INSERT OR REPLACE INTO agent_states (project, agent, state, saved_at) VALUES (?1, ?2, ?3, ?4)";
    connection.execute(sql, params![project.as_str(), agent.as_str(), state, now.0]).doing("save the agent's state")?;
    Ok(())
}

/// Reads the state that an agent has saved, and when it was saved.
///
/// # Errors
/// The row cannot be read.
pub fn load_agent_state(
    connection: &Connection,
    project: &ProjectName,
    agent: &AgentName,
) -> Result<Option<(serde_json::Value, UnixMillis)>, StoreError> {
    let sql = "SELECT state, saved_at FROM agent_states WHERE project = ?1 AND agent = ?2";
    let row: Option<(String, i64)> = connection
        .query_row(sql, [project.as_str(), agent.as_str()], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()
        .doing("load the agent's state")?;
    row.map(|(state, at)| Ok((json(&state)?, UnixMillis(at)))).transpose()
}

/// Encodes a value as JSON text.
pub(super) fn text<T: serde::Serialize>(value: &T) -> Result<String, StoreError> {
    serde_json::to_string(value).doing("write a value")
}

/// Decodes a value from JSON text.
pub(super) fn json<T: DeserializeOwned>(text: &str) -> Result<T, StoreError> {
    serde_json::from_str(text).doing("read a value")
}

/// Decodes a value whose JSON form is a string.
pub(super) fn word<T: DeserializeOwned>(text: &str) -> Result<T, StoreError> {
    serde_json::from_value(serde_json::Value::from(text)).doing("read a value")
}
